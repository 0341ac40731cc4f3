package redirect

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Chain is a list of rules that is walked from the top, first match wins. What
// matches no rule of its chain passes.
type Chain string

// The chains. Output and prerouting are entered by packets; inbound by the
// rules of these two whose verdict is ToInbound.
const (
	ChainOutput     Chain = "output"     // connections opened inside the pod
	ChainPrerouting Chain = "prerouting" // connections that arrive at an interface
	ChainInbound    Chain = "inbound"    // connections to the pod that the inbound port may take
)

// Verdict is what a rule does with a connection.
type Verdict string

// The verdicts.
const (
	Pass      Verdict = "pass"     // untouched by Preroute
	ToInbound Verdict = "inbound"  // goes on in the chain inbound
	Redirect  Verdict = "redirect" // NAT to Rule.Port
	TProxy    Verdict = "tproxy"   // to a transparent listener on Rule.Port, without NAT
)

// Proto is a set of transport protocols.
type Proto uint8

// The protocols that rules tell apart.
const (
	ProtoTCP Proto = 1 << iota
	ProtoUDP
)

// Each lists the protocols of the set.
func (p Proto) Each() []Proto {
	var out []Proto
	for _, one := range []Proto{ProtoTCP, ProtoUDP} {
		if p&one != 0 {
			out = append(out, one)
		}
	}
	return out
}

// Locality says whether an address is one of the pod's own, loopback included
// (RTN_LOCAL in the kernel's routing tables).
type Locality uint8

// The localities a rule may ask for.
const (
	Anywhere Locality = iota
	Local
	NotLocal
)

// Match is what a rule asks of a connection: all of the fields that are set.
type Match struct {
	Proto       Proto    // zero: any protocol
	NotProto    Proto    // none of these
	Interfaces  []string // leaves by (output) or arrives at (prerouting) one of these
	UIDs        []uint32 // the socket's owner has one of these UIDs ...
	GIDs        []uint32 // ... or one of these as its primary GID
	Src         Nets     // from one of these
	NotSrc      Nets     // from none of these
	SrcIs       Locality
	SrcPort     uint16
	Dst         Nets // to one of these
	NotDst      Nets // to none of these
	DstIs       Locality
	DstPorts    Ports
	NotDstPorts Ports
}

// Rule is one step of a redirect.
type Rule struct {
	Chain   Chain
	Row     string // the row of the contract's table it fulfils: "O3"
	Why     string // what a person calls the traffic it matches
	Match   Match
	Verdict Verdict
	Port    uint16 // of Redirect and TProxy
}

var (
	loopback = Nets{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}
	// passthrough is where a proxy with hairpin dials the app from, so that the
	// connection is not taken for the app's client: Istio's InboundPassthroughCluster.
	passthrough = Nets{netip.MustParsePrefix("127.0.0.6/32"), netip.MustParsePrefix("::6/128")}
	dnsPorts    = Ports{{53, 53}}
)

// Rules compiles the policy. The order within a chain is the meaning: an
// exception stands above the inclusion it excepts from.
func (p *Policy) Rules() []Rule {
	return slices.Concat(p.outputRules(), p.preroutingRules(), p.inboundRules())
}

// ownerMatch is the proxy's sockets; ok is false when the policy names no owner.
func (p *Policy) ownerMatch() (m Match, ok bool) {
	return Match{UIDs: p.Proxy.UIDs, GIDs: p.Proxy.GIDs}, len(p.Proxy.UIDs)+len(p.Proxy.GIDs) > 0
}

func (p *Policy) outputRules() []Rule {
	var rules []Rule
	in, out := &p.Inbound, &p.Outbound
	takesTCP := out.Port != 0
	var protos Proto
	if takesTCP || in.Port != 0 {
		protos = ProtoTCP
	}
	if p.DNS.Port != 0 {
		protos = ProtoTCP | ProtoUDP
	}
	if protos == 0 {
		return nil
	}
	add := func(row, why string, m Match, v Verdict, port uint16) {
		if m.NotProto == 0 && m.Proto == 0 {
			m.Proto = protos
		}
		rules = append(rules, Rule{ChainOutput, row, why, m, v, port})
	}

	add("Z1", "a protocol that is not redirected", Match{NotProto: protos}, Pass, 0)
	if len(p.ExceptInterfaces) > 0 {
		add("I5", "an excepted interface", Match{Interfaces: p.ExceptInterfaces}, Pass, 0)
	}
	add("O3", "loopback", Match{Dst: loopback}, Pass, 0)
	owner, hasOwner := p.ownerMatch()
	if in.Port != 0 {
		// No app can own the inbound port as its source port while the proxy
		// listens on it; preroute verify, which runs before the proxy, can.
		add("V1", "a probe of preroute verify", Match{Proto: ProtoTCP, SrcIs: Local, SrcPort: in.Port, DstIs: Local}, ToInbound, 0)
		if p.Proxy.Hairpin && hasOwner {
			m := owner
			m.Proto, m.SrcIs, m.NotSrc, m.DstIs = ProtoTCP, Local, passthrough, Local
			add("O5", "the proxy to the pod's own address, hairpin", m, ToInbound, 0)
		}
	}
	if !takesTCP && p.DNS.Port == 0 {
		return rules
	}
	if hasOwner {
		add("O2", "the proxy's own traffic", owner, Pass, 0)
	}
	add("O4", "the pod's own address", Match{DstIs: Local}, Pass, 0)
	if len(out.ExceptUIDs) > 0 {
		add("O6", "an excepted UID", Match{UIDs: out.ExceptUIDs}, Pass, 0)
	}
	if len(out.ExceptNets) > 0 {
		add("O6", "an excepted network", Match{Dst: out.ExceptNets}, Pass, 0)
	}
	if p.DNS.Port != 0 {
		add("D1", "the app's DNS", Match{DstPorts: dnsPorts}, Redirect, p.DNS.Port)
	}
	if takesTCP {
		if len(out.ExceptPorts) > 0 {
			add("O6", "an excepted port", Match{DstPorts: out.ExceptPorts}, Pass, 0)
		}
		if len(out.Nets) > 0 {
			add("O6", "outside the networks that are redirected", Match{NotDst: out.Nets}, Pass, 0)
		}
		if len(out.Ports) > 0 {
			add("O6", "outside the ports that are redirected", Match{NotDstPorts: out.Ports}, Pass, 0)
		}
		add("O1", "the app's TCP", Match{Proto: ProtoTCP}, Redirect, out.Port)
	}
	return rules
}

func (p *Policy) preroutingRules() []Rule {
	if p.Inbound.Port == 0 {
		return nil
	}
	var rules []Rule
	add := func(row, why string, m Match, v Verdict) {
		if m.NotProto == 0 {
			m.Proto = ProtoTCP
		}
		rules = append(rules, Rule{ChainPrerouting, row, why, m, v, 0})
	}
	add("Z1", "a protocol that is not redirected", Match{NotProto: ProtoTCP}, Pass)
	add("O3", "loopback", Match{Interfaces: []string{"lo"}}, Pass)
	if len(p.ExceptInterfaces) > 0 {
		add("I5", "an excepted interface", Match{Interfaces: p.ExceptInterfaces}, Pass)
	}
	add("I1", "forwarded through the pod, not to it", Match{DstIs: NotLocal}, Pass)
	add("I1", "from outside to the pod", Match{}, ToInbound)
	return rules
}

func (p *Policy) inboundRules() []Rule {
	in := &p.Inbound
	if in.Port == 0 {
		return nil
	}
	var rules []Rule
	add := func(row, why string, m Match, v Verdict, port uint16) {
		m.Proto = ProtoTCP
		rules = append(rules, Rule{ChainInbound, row, why, m, v, port})
	}
	if len(in.ExceptSources) > 0 {
		add("I2", "an excepted source", Match{Src: in.ExceptSources}, Pass, 0)
	}
	add("I3", "the inbound port itself", Match{DstPorts: Ports{{in.Port, in.Port}}}, Pass, 0)
	if len(in.ExceptPorts) > 0 {
		add("I2", "an excepted port", Match{DstPorts: in.ExceptPorts}, Pass, 0)
	}
	if len(in.Ports) > 0 {
		add("I2", "outside the ports that are redirected", Match{NotDstPorts: in.Ports}, Pass, 0)
	}
	if in.Mode == ModeTProxy {
		add("I4", "TCP to the pod", Match{}, TProxy, in.Port)
	} else {
		add("I1", "TCP to the pod", Match{}, Redirect, in.Port)
	}
	return rules
}

// Print writes the rules a line each, as a person reads them.
func Print(rules []Rule) string {
	var b strings.Builder
	var chain Chain
	for _, r := range rules {
		if r.Chain != chain {
			chain = r.Chain
			fmt.Fprintf(&b, "%s:\n", chain)
		}
		fmt.Fprintf(&b, "  %s\n", r)
	}
	return b.String()
}

// String prints the rule on one line, without its chain.
func (r Rule) String() string {
	v := string(r.Verdict)
	if r.Port != 0 {
		v += " to port " + strconv.Itoa(int(r.Port))
	}
	return fmt.Sprintf("%s  %-9s %s  # %s", r.Row, v+":", r.Match, r.Why)
}

// String prints the match as a phrase; "anything" when it asks for nothing.
func (m Match) String() string {
	var out []string
	say := func(cond bool, format string, args ...any) {
		if cond {
			out = append(out, fmt.Sprintf(format, args...))
		}
	}
	say(m.Proto != 0, "%s", m.Proto)
	say(m.NotProto != 0, "neither of %s", m.NotProto)
	say(len(m.Interfaces) > 0, "interface %s", strings.Join(m.Interfaces, ","))
	switch {
	case len(m.UIDs) > 0 && len(m.GIDs) > 0:
		say(true, "of uid %s or gid %s", ids(m.UIDs), ids(m.GIDs))
	case len(m.UIDs) > 0:
		say(true, "of uid %s", ids(m.UIDs))
	case len(m.GIDs) > 0:
		say(true, "of gid %s", ids(m.GIDs))
	}
	say(len(m.Src) > 0, "from %s", m.Src)
	say(m.SrcIs == Local, "from the pod's own address")
	say(m.SrcIs == NotLocal, "from another address than the pod's")
	say(len(m.NotSrc) > 0, "but not from %s", m.NotSrc)
	say(m.SrcPort != 0, "source port %d", m.SrcPort)
	say(len(m.Dst) > 0, "to %s", m.Dst)
	say(m.DstIs == Local, "to the pod's own address")
	say(m.DstIs == NotLocal, "to another address than the pod's")
	say(len(m.NotDst) > 0, "but not to %s", m.NotDst)
	say(len(m.DstPorts) > 0, "to port %s", m.DstPorts)
	say(len(m.NotDstPorts) > 0, "to another port than %s", m.NotDstPorts)
	if len(out) == 0 {
		return "anything"
	}
	return strings.Join(out, " ")
}

// String prints the set: "tcp", "udp" or "tcp,udp".
func (p Proto) String() string {
	switch p {
	case ProtoTCP:
		return "tcp"
	case ProtoUDP:
		return "udp"
	case ProtoTCP | ProtoUDP:
		return "tcp,udp"
	}
	return fmt.Sprintf("proto(%d)", uint8(p))
}

func ids(list []uint32) string {
	s := make([]string, len(list))
	for i, id := range list {
		s[i] = strconv.FormatUint(uint64(id), 10)
	}
	return strings.Join(s, ",")
}
