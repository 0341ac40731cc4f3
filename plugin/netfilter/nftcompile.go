package netfilter

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/preroute/preroute/plugin/redirect"
	"golang.org/x/sys/unix"
)

// An nftTable is the table inet preroute as it is to be: each set, chain and
// rule both as text, which nft(8) reads and a person compares, and as what the
// kernel is sent.
type nftTable struct {
	sets   []*nftSet
	chains []*nftChain
	protos redirect.Proto // that the first rule of the output chains lets on
}

type nftChain struct {
	table string
	name  string
	typ   nftables.ChainType // "" for a chain that is only jumped to
	hook  *nftables.ChainHook
	prio  *nftables.ChainPriority
	where string // hook and priority, as nft writes them
	rules []nftRule
}

type nftRule struct {
	*line
	comment string
}

// TableName is the one table of ours, of family inet.
const TableName = "preroute"

const maxComment = 128 // NFTNL_UDATA_COMMENT_MAXLEN of libnftnl, its end mark included

// Ruleset prints the table that policy p compiles to, in nft(8)'s syntax; ""
// when the policy redirects nothing.
func Ruleset(p *redirect.Policy) string {
	if t := compileNFT(p); t != nil {
		return t.String()
	}
	return ""
}

func (t *nftTable) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s {\n", TableName)
	for _, s := range t.sets {
		flags := fmt.Sprintf("\t\tsize %d\n", len(s.elems))
		if s.interval {
			flags = "\t\tflags interval\n"
		}
		fmt.Fprintf(&b, "\tset %s {\n\t\ttype %s\n%s\t\telements = { %s }\n\t}\n\n", s.name, s.key.Name, flags, strings.Join(s.text(), ", "))
	}
	for i, c := range t.chains {
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "\tchain %s {\n", c.name)
		if c.typ != "" {
			fmt.Fprintf(&b, "\t\ttype %s hook %s; policy accept;\n", c.typ, c.where)
		}
		for _, r := range c.rules {
			fmt.Fprintf(&b, "\t\t%s comment %q\n", r, r.comment)
		}
		b.WriteString("\t}\n")
	}
	b.WriteString("}\n")
	return b.String()
}

// compileNFT turns the policy into the table; nil when it redirects nothing.
//
// The chains output, prerouting and inbound are the policy's rules as they
// stand. Two things the rules do not say need chains of their own: where a
// captured DNS query is tracked (dnsChains), and how tproxy tells apart what
// belongs to a connection already made (tproxyChains).
func compileNFT(p *redirect.Policy) *nftTable {
	rules := p.Rules()
	if len(rules) == 0 {
		return nil
	}
	t := &nftTable{protos: rules[0].Match.NotProto}
	tproxy := p.Inbound.Port != 0 && p.Inbound.Mode == redirect.ModeTProxy
	if p.DNS.Port != 0 {
		t.dnsChains(p, rules)
	}
	if tproxy {
		t.markChain(p, rules)
	}
	out := t.chain("output", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest, "output priority -100")
	for _, r := range ofChain(rules, redirect.ChainOutput) {
		if r.Verdict == redirect.ToInbound && tproxy {
			r.Verdict = redirect.Pass // the mark chain has marked it for prerouting
		}
		t.add(out, r)
	}
	if !slices.ContainsFunc(out.rules, nftRule.acts) {
		t.chains = t.chains[:len(t.chains)-1]
	}
	if p.Inbound.Port == 0 {
		return t
	}
	var pre *nftChain
	if tproxy {
		pre = t.chain("prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityMangle, "prerouting priority mangle")
	} else {
		pre = t.chain("prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, "prerouting priority dstnat")
	}
	for _, r := range ofChain(rules, redirect.ChainPrerouting) {
		t.add(pre, r)
		if tproxy && r.Match.NotProto != 0 {
			// Unlike nat chains, this one sees every packet of a connection.
			pre.rule("an answer to a connection of the pod's own", (&line{}).ctDirection(directionReply).verdict(expr.VerdictAccept, ""))
			pre.rule("from the chain output_mark", (&line{}).ifname("iifname", "lo").mark(markToInbound).verdict(expr.VerdictJump, "inbound"))
		}
	}
	in := t.chain("inbound", "", nil, nil, "")
	for _, r := range ofChain(rules, redirect.ChainInbound) {
		t.add(in, r)
	}
	if tproxy {
		in.rule("F1 nobody listens on the inbound port: never past the proxy",
			(&line{}).l4proto("==", redirect.ProtoTCP).syn().verdict(expr.VerdictDrop, ""))
	}
	return t
}

// ofChain returns the rules of one chain, in their order.
func ofChain(rules []redirect.Rule, c redirect.Chain) []redirect.Rule {
	var out []redirect.Rule
	for _, r := range rules {
		if r.Chain == c {
			out = append(out, r)
		}
	}
	return out
}

// upToInbound returns the rules up to the last that leads to the inbound chain:
// what has to be known of a connection to tell whether one does.
func upToInbound(rules []redirect.Rule) []redirect.Rule {
	for i, r := range slices.Backward(rules) {
		if r.Verdict == redirect.ToInbound {
			return rules[:i+1]
		}
	}
	return nil
}

// dnsChains keep a captured query and the proxy's own in different conntrack
// zones, since both may use the same port to the same server: without, one
// that finds the other's entry is sent where the other was. The proxy's own stay
// in zone 0, where everybody else looks for them.
//
// A captured query also gets a loopback source, so that a proxy that answers
// from a wildcard socket answers from the address it was sent to. TCP needs
// neither: the kernel never has two sockets with the same four numbers.
func (t *nftTable) dnsChains(p *redirect.Policy, rules []redirect.Rule) {
	zone := t.chain("dns_zone", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityRaw, "output priority raw")
	zone.rule("Z1 not DNS", (&line{}).l4proto("!=", redirect.ProtoUDP).verdict(expr.VerdictAccept, ""))
	lo := []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32"), netip.MustParsePrefix("::1/128")}
	for _, a := range lo {
		// Queries sent to the DNS port itself are of the zone too, so that the
		// loopback sources given to captured ones steer clear of theirs.
		for _, dir := range []string{"sport", "dport"} {
			zone.rule("D1 on loopback, with the proxy's DNS port",
				(&line{}).nfproto(a.Addr()).addr("saddr", "==", a).addr("daddr", "==", a).
					port(0, dir, "==", p.DNS.Port).ctZoneSet())
		}
	}
	zone.rule("Z1 not DNS", (&line{}).port(0, "dport", "!=", 53).verdict(expr.VerdictAccept, ""))
	for _, r := range ofChain(rules, redirect.ChainOutput) {
		if r.Match.NotProto != 0 || r.Match.Proto&redirect.ProtoUDP == 0 {
			continue
		}
		if r.Verdict == redirect.Redirect { // D1: every query that came so far
			zone.rule(r.Row+" "+r.Why, (&line{}).ctZoneSet())
			break
		}
		t.add(zone, r)
	}
	ans := t.chain("dns_source", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, "postrouting priority srcnat")
	for _, a := range lo {
		ans.rule("D1 a loopback source, for proxies that answer from a wildcard socket",
			(&line{}).ctZone().ctDNAT().nfproto(a.Addr()).port(0, "dport", "==", p.DNS.Port).snat(a.Addr()))
	}
}

// markChain serves mode tproxy, where prerouting takes packets without NAT:
// the answers to a proxy that dials the app from the client's address are
// brought back to lo (see route.go), and what the output chain sends to inbound
// is marked for the prerouting chain, which meets it again on lo.
func (t *nftTable) markChain(p *redirect.Policy, rules []redirect.Rule) {
	c := t.chain("output_mark", nftables.ChainTypeRoute, nftables.ChainHookOutput, nftables.ChainPriorityMangle, "output priority mangle")
	c.rule("Z1 a protocol that is not redirected", (&line{}).l4proto("!=", redirect.ProtoTCP).verdict(expr.VerdictAccept, ""))
	c.rule("I4 the app's answer to a client whose address the proxy holds",
		(&line{}).ctDirection(directionReply).ctMark(markToLo).markSet(markToLo).verdict(expr.VerdictAccept, ""))
	c.rule("an answer", (&line{}).ctDirection(directionReply).verdict(expr.VerdictAccept, ""))
	// Where the policy names no owner, whoever may bind such an address is the proxy.
	for _, owner := range t.owners(redirect.Match{UIDs: p.Proxy.UIDs, GIDs: p.Proxy.GIDs}) {
		c.rule("I4 the proxy dials the app from the client's address",
			(&line{}).join(owner).ctNew().fib("saddr", redirect.NotLocal).fib("daddr", redirect.Local).ctMarkSet(markToLo))
	}
	for _, r := range upToInbound(ofChain(rules, redirect.ChainOutput)) {
		switch {
		case r.Match.NotProto != 0:
		case r.Verdict == redirect.ToInbound:
			for _, l := range t.lines(r) {
				c.rule(r.Row+" "+r.Why, l.markSet(markToInbound).verdict(expr.VerdictAccept, ""))
			}
		default:
			t.add(c, r)
		}
	}
}

// acts tells a rule that does something from one that lets pass.
func (r nftRule) acts() bool {
	v, ok := r.exprs[len(r.exprs)-1].(*expr.Verdict)
	return !ok || v.Kind != expr.VerdictAccept
}

func (t *nftTable) chain(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority, where string) *nftChain {
	c := &nftChain{table: TableName, name: name, typ: typ, hook: hook, prio: prio, where: where}
	t.chains = append(t.chains, c)
	return c
}

func (c *nftChain) rule(comment string, l *line) {
	if len(comment) >= maxComment {
		comment = comment[:maxComment-1]
	}
	c.rules = append(c.rules, nftRule{l, comment})
}

// add appends one rule of the policy: as many nft rules as its owner lists,
// families and protocols need.
func (t *nftTable) add(c *nftChain, r redirect.Rule) {
	for _, l := range t.lines(r) {
		switch r.Verdict {
		case redirect.Pass:
			l.verdict(expr.VerdictAccept, "")
		case redirect.ToInbound:
			l.verdict(expr.VerdictJump, "inbound")
		case redirect.Redirect:
			l.redirect(r.Port)
		case redirect.TProxy:
			l.tproxy(r.Port)
		}
		c.rule(r.Row+" "+r.Why, l)
	}
}

// lines compiles a match. Protocols are named only where a port or a verdict
// needs one: the first rule of each chain has let the others pass.
func (t *nftTable) lines(r redirect.Rule) []*line {
	m := r.Match
	if m.NotProto != 0 {
		return []*line{(&line{}).l4proto("!=", m.NotProto)}
	}
	protos := []redirect.Proto{0}
	switch {
	case r.Verdict == redirect.Redirect || r.Verdict == redirect.TProxy || m.SrcPort != 0:
		protos = m.Proto.Each()
	case r.Chain == redirect.ChainOutput && m.Proto != t.protos:
		protos[0] = m.Proto
	}
	var out []*line
	for _, proto := range protos {
		for _, owner := range t.owners(m) {
			for _, addrs := range t.addresses(r) {
				for _, ports := range t.ports(r, proto) {
					l := &line{}
					if proto != 0 {
						l.l4proto("==", proto)
					}
					if len(m.Interfaces) > 0 {
						l.interfaces(t, r.Chain, m.Interfaces)
					}
					l.join(owner).join(addrs).join(ports)
					l.fib("saddr", m.SrcIs).fib("daddr", m.DstIs)
					out = append(out, l)
				}
			}
		}
	}
	return out
}

// ports is what the match says of ports: one line, or one of several that have
// to match.
func (t *nftTable) ports(r redirect.Rule, proto redirect.Proto) []*line {
	m := r.Match
	var out []*line
	for _, yes := range portTests(t, proto, m.Proto, "==", m.DstPorts, portSet(r, "except_ports")) {
		for _, no := range portTests(t, proto, m.Proto, "!=", m.NotDstPorts, portSet(r, "ports")) {
			l := &line{}
			if m.SrcPort != 0 {
				l.port(proto, "sport", "==", m.SrcPort)
			}
			out = append(out, l.join(yes).join(no))
		}
	}
	return out
}

func portSet(r redirect.Rule, suffix string) string {
	if r.Chain == redirect.ChainInbound {
		return "in_" + suffix
	}
	return "out_" + suffix
}

// owners is one line for the UIDs, one for the GIDs; an empty one for neither.
func (t *nftTable) owners(m redirect.Match) []*line {
	var out []*line
	if len(m.UIDs) > 0 {
		out = append(out, (&line{}).ids(t, "skuid", m.UIDs))
	}
	if len(m.GIDs) > 0 {
		out = append(out, (&line{}).ids(t, "skgid", m.GIDs))
	}
	if out == nil {
		out = []*line{{}}
	}
	return out
}

// addresses is what the match says of networks: a line per family, or several of
// which one has to match.
func (t *nftTable) addresses(r redirect.Rule) []*line {
	m := r.Match
	if len(m.Src)+len(m.NotSrc)+len(m.Dst)+len(m.NotDst) == 0 {
		return []*line{{}}
	}
	var out []*line
	for _, is4 := range []bool{true, false} {
		src, notSrc, dst, notDst := m.Src.Family(is4), m.NotSrc.Family(is4), m.Dst.Family(is4), m.NotDst.Family(is4)
		if len(m.Src) > 0 && len(src) == 0 || len(m.Dst) > 0 && len(dst) == 0 {
			continue
		}
		any := netip.IPv6Unspecified()
		if is4 {
			any = netip.IPv4Unspecified()
		}
		no := (&line{}).join(netTests(t, "saddr", "!=", notSrc, "passthrough")[0]).join(netTests(t, "daddr", "!=", notDst, "nets")[0])
		for _, from := range netTests(t, "saddr", "==", src, "except_sources") {
			for _, to := range netTests(t, "daddr", "==", dst, "except_nets") {
				out = append(out, (&line{}).nfproto(any).join(from).join(to).join(no))
			}
		}
	}
	return out
}

func be16(n uint16) []byte { return binary.BigEndian.AppendUint16(nil, n) }

func protoNumber(p redirect.Proto) byte {
	if p == redirect.ProtoUDP {
		return unix.IPPROTO_UDP
	}
	return unix.IPPROTO_TCP
}
