package netfilter

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/preroute/preroute/plugin/redirect"
)

// The iptables form of a policy. Where the rules go:
//
//	raw     OUTPUT       the app's DNS queries, and the proxy's answers to them,
//	                     get a conntrack zone of their own
//	mangle  OUTPUT       tproxy: marks what has to come back to the pod over lo
//	mangle  PREROUTING   tproxy: hands what arrives to the transparent listener
//	nat     OUTPUT       the redirects of connections opened in the pod
//	nat     PREROUTING   the redirects of connections that arrive
//	nat     POSTROUTING  captured DNS queries over UDP come from loopback, so that
//	                     a proxy that answers from a wildcard socket answers right
//
// Every line is written as iptables-save prints it back, in either flavour, so
// that a check compares text. A comment stands behind the matches: a packet that
// fails them does not pay for it.

// Names of the tables, and of our chains: whatever starts with chainPrefix is ours.
const (
	tableRaw    = "raw"
	tableMangle = "mangle"
	tableNat    = "nat"

	chainPrefix      = "PREROUTE_"
	chainOutput      = chainPrefix + "OUTPUT"
	chainPrerouting  = chainPrefix + "PREROUTING"
	chainPostrouting = chainPrefix + "POSTROUTING"
	chainInbound     = chainPrefix + "INBOUND"
)

// markTaken is the bit of the connection's mark that says that tproxy took its
// first packet. TPROXY has to see the later ones too, or a listener that
// answers with SYN cookies would miss the last packet of the handshake. But it
// drops what belongs to a socket that is not transparent, so it must not see
// those of connections that the app accepted before the policy came.
const markTaken = 0x4000000

// RestoreInput prints policy p for one iptables-restore --noflush (IPv4) or
// ip6tables-restore --noflush (IPv6) in a namespace that has nothing of ours.
func RestoreInput(p *redirect.Policy, is4 bool) string {
	return compile(p, is4).restore(ruleset{})
}

// compile turns the policy into the tables of one family.
func compile(p *redirect.Policy, is4 bool) ruleset {
	rules := p.Rules()
	output, prerouting, inbound := ofChain(rules, redirect.ChainOutput), ofChain(rules, redirect.ChainPrerouting), ofChain(rules, redirect.ChainInbound)
	rs := ruleset{}
	if p.DNS.Port != 0 {
		rs.add(tableRaw, "OUTPUT", dnsZones(p, output, is4))
	}
	tproxy := p.Inbound.Port != 0 && p.Inbound.Mode == redirect.ModeTProxy
	if tproxy {
		rs.add(tableMangle, "OUTPUT", tproxyMarks(p, output, is4))
		rs.add(tableMangle, "PREROUTING", tproxyPrerouting(prerouting, is4))
		rs.add(tableMangle, "", plainChain(chainInbound, "-i", inbound, is4, tproxy))
	}
	if p.Outbound.Port != 0 || p.DNS.Port != 0 || p.Inbound.Port != 0 && !tproxy {
		rs.add(tableNat, "OUTPUT", plainChain(chainOutput, "-o", output, is4, tproxy))
	}
	if p.Inbound.Port != 0 && !tproxy {
		rs.add(tableNat, "PREROUTING", plainChain(chainPrerouting, "-i", prerouting, is4, tproxy))
		rs.add(tableNat, "", plainChain(chainInbound, "-i", inbound, is4, tproxy))
	}
	if p.DNS.Port != 0 {
		rs.add(tableNat, "POSTROUTING", dnsSource(p, is4))
	}
	return rs
}

// plainChain prints the rules of one chain with the verdict each has.
func plainChain(name, dev string, rules []redirect.Rule, is4, tproxy bool) []chain {
	w := newChainWriter(name, dev, is4)
	if name == chainInbound {
		w.guard = redirect.ProtoTCP // the rules that lead here say so
	}
	for _, r := range rules {
		switch r.Verdict {
		case redirect.Pass:
			// RETURN, not ACCEPT: what we leave alone is for the rules of others.
			w.add(r.Match, "", "-j RETURN", comment(r))
		case redirect.ToInbound:
			if tproxy { // taken in mangle PREROUTING, see tproxyMarks
				w.add(r.Match, "", "-j RETURN", comment(r))
				continue
			}
			// goto, not jump: what inbound does not take passes, and must not
			// meet the rules that follow here.
			w.add(r.Match, "", "-g "+chainInbound, comment(r))
		case redirect.Redirect:
			w.add(r.Match, "", fmt.Sprintf("-j REDIRECT --to-ports %d", r.Port), comment(r))
		case redirect.TProxy:
			w.addTProxy(r)
		}
	}
	return w.chains
}

// addTProxy hands a connection to the listener. Without one TPROXY drops the
// packet, so it never reaches the app.
func (w *chainWriter) addTProxy(r redirect.Rule) {
	anyAddr := "::"
	if w.is4 {
		anyAddr = "0.0.0.0"
	}
	target := fmt.Sprintf("-j TPROXY --on-port %d --on-ip %s --tproxy-mark 0x0/0x0", r.Port, anyAddr)
	const first = "-m tcp --tcp-flags FIN,SYN,RST,ACK SYN"
	bit := fmt.Sprintf("%#x/%#x", markTaken, markTaken)
	w.add(r.Match, first, "-j CONNMARK --set-xmark "+bit, comment(r)+", remember the connection")
	// By its flags and not by the mark alone: a packet that conntrack calls
	// invalid has no connection that could bear the mark.
	w.add(r.Match, first, target, comment(r))
	w.add(r.Match, "-m connmark --mark "+bit, target, comment(r))
}

// tproxyPrerouting is the prerouting chain in mangle. Unlike nat, mangle sees
// every packet of a connection, in both directions, and lo carries both.
func tproxyPrerouting(rules []redirect.Rule, is4 bool) []chain {
	w := newChainWriter(chainPrerouting, "-i", is4)
	w.only(redirect.ProtoTCP)
	w.add(redirect.Match{}, "-m conntrack --ctdir REPLY", "-j RETURN", `I4: an answer to the pod`)
	for _, r := range rules {
		switch {
		case slices.Equal(r.Match.Interfaces, []string{"lo"}):
			w.add(r.Match, fmt.Sprintf("-m mark ! --mark %#x/%#x", markToInbound, markToInbound), "-j RETURN", comment(r)+", but for what the output chain marked")
		case r.Verdict == redirect.ToInbound:
			w.add(r.Match, "", "-g "+chainInbound, comment(r))
		default:
			w.add(r.Match, "", "-j RETURN", comment(r))
		}
	}
	return w.chains
}

// tproxyMarks is the output chain in mangle, whose hook routes a packet again
// when its mark changes.
//
// A proxy that dials the app from the client's address: the connection is
// remembered by a bit in its mark, and the app's answers, which would leave by
// eth0, are sent to lo by the same bit in theirs (route.go has the route).
//
// A connection that output's rules send to inbound gets a bit by which the
// prerouting chain knows it from others on lo.
func tproxyMarks(p *redirect.Policy, rules []redirect.Rule, is4 bool) []chain {
	w := newChainWriter(chainOutput, "-o", is4)
	w.only(redirect.ProtoTCP)
	toLo := fmt.Sprintf("%#x/%#x", markToLo, markToLo)
	w.add(redirect.Match{}, "-m conntrack --ctdir REPLY -m connmark --mark "+toLo, "-j MARK --set-xmark "+toLo, "I4: the app's answer to the proxy, which holds the client's address")
	w.add(redirect.Match{}, "-m conntrack --ctdir REPLY", "-j RETURN", "I4: another answer")
	// Where the policy names no owner, whoever may bind such an address is the proxy.
	w.add(redirect.Match{UIDs: p.Proxy.UIDs, GIDs: p.Proxy.GIDs, SrcIs: redirect.NotLocal, DstIs: redirect.Local},
		"-m conntrack --ctstate NEW --ctdir ORIGINAL", "-j CONNMARK --set-xmark "+toLo, "I4: the proxy dials the app from the client's address")
	for _, r := range upToInbound(rules) {
		if r.Verdict == redirect.ToInbound {
			w.add(r.Match, "", fmt.Sprintf("-j MARK --set-xmark %#x/%#x", markToInbound, markToInbound), comment(r))
		} else {
			w.add(r.Match, "", "-j RETURN", comment(r))
		}
	}
	return w.chains
}

// dnsZones keeps the app's captured queries apart from the proxy's own: both may
// go from the same port to the same server, and one conntrack entry could not
// tell their answers apart. The flow between app and proxy is wholly in the
// zone, so the proxy's answers are sent there too, by their port.
func dnsZones(p *redirect.Policy, rules []redirect.Rule, is4 bool) []chain {
	w := newChainWriter(chainOutput, "-o", is4)
	w.only(redirect.ProtoUDP)
	zone := fmt.Sprintf("-j CT --zone %d", routeID)
	lo := redirect.Nets{loopbackHost(is4)}
	w.add(redirect.Match{Src: lo, Dst: lo, SrcPort: p.DNS.Port}, "", zone, "D1: the proxy's answer to a captured query")
	w.add(redirect.Match{Src: lo, Dst: lo, DstPorts: redirect.Ports{{First: p.DNS.Port, Last: p.DNS.Port}}}, "", zone, "D1: a query to the proxy itself")
	w.add(redirect.Match{NotDstPorts: redirect.Ports{{First: 53, Last: 53}}}, "", "-j RETURN", "D1: no query")
	for _, r := range rules {
		if r.Verdict == redirect.Redirect {
			w.add(r.Match, "", zone, comment(r))
			break
		}
		w.add(r.Match, "", "-j RETURN", comment(r))
	}
	return w.chains
}

// dnsSource makes captured queries over UDP come from the loopback address that
// they now go to.
func dnsSource(p *redirect.Policy, is4 bool) []chain {
	w := newChainWriter(chainPostrouting, "-o", is4)
	lo := loopbackHost(is4)
	w.add(redirect.Match{
		Proto: redirect.ProtoUDP, Interfaces: []string{"lo"}, Dst: redirect.Nets{lo},
		DstPorts: redirect.Ports{{First: p.DNS.Port, Last: p.DNS.Port}},
	}, "-m conntrack --ctstate DNAT --ctorigdstport 53", "-j SNAT --to-source "+lo.Addr().String()+" --random-fully", "D1: a captured query comes from loopback")
	return w.chains
}

func loopbackHost(is4 bool) netip.Prefix {
	if is4 {
		return netip.MustParsePrefix("127.0.0.1/32")
	}
	return netip.MustParsePrefix("::1/128")
}

func comment(r redirect.Rule) string { return r.Row + ": " + r.Why }

// quoted prints a comment as iptables-save does: bare when it is one word, else
// in quotes, with a backslash before quotes of either kind and backslashes.
func quoted(s string) string {
	if !strings.ContainsAny(s, ` "'\`) {
		return s
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `'`, `\'`).Replace(s) + `"`
}
