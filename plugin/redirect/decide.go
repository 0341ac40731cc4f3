package redirect

import (
	"fmt"
	"net/netip"
	"slices"
)

// Conn is the first packet of a connection, or a datagram, as the rules see it.
type Conn struct {
	Proto Proto // ProtoTCP or ProtoUDP
	// Chain is where the packet enters: ChainOutput when it was opened inside the
	// pod, ChainPrerouting when it arrives at an interface.
	Chain     Chain
	Interface string // it leaves by or arrives at; "" is one no rule names
	UID, GID  uint32 // of the socket's owner, in ChainOutput
	Src, Dst  netip.AddrPort
	// Own is the pod's own addresses; loopback needs no mention.
	Own []netip.Addr
}

// Decision is what the rules do with a connection.
type Decision struct {
	Verdict Verdict // Pass, Redirect or TProxy
	Port    uint16  // the proxy's, unless Pass
	Rule    *Rule   // the rule that decided; nil when no rule matched
}

// String is a sentence about the connection's fate.
func (d Decision) String() string {
	because := "no rule speaks of it"
	if d.Rule != nil {
		because = fmt.Sprintf("rule %s: %s", d.Rule.Row, d.Rule.Why)
	}
	switch d.Verdict {
	case Redirect:
		return fmt.Sprintf("is redirected to the proxy's port %d (%s)", d.Port, because)
	case TProxy:
		return fmt.Sprintf("is handed to the proxy's transparent listener on port %d, addresses unchanged (%s)", d.Port, because)
	default:
		return fmt.Sprintf("is left alone (%s)", because)
	}
}

// Decide walks the rules for one connection, as the kernel does.
func Decide(rules []Rule, c Conn) Decision {
	chain := c.Chain
	for i := 0; i < len(rules); i++ {
		r := &rules[i]
		if r.Chain != chain || !r.Match.matches(c) {
			continue
		}
		if r.Verdict == ToInbound {
			chain, i = ChainInbound, -1
			continue
		}
		return Decision{r.Verdict, r.Port, r}
	}
	return Decision{Verdict: Pass}
}

func (m *Match) matches(c Conn) bool {
	src, dst := c.Src.Addr(), c.Dst.Addr()
	owned := slices.Contains(m.UIDs, c.UID) || slices.Contains(m.GIDs, c.GID)
	switch {
	case m.Proto != 0 && m.Proto&c.Proto == 0,
		m.NotProto&c.Proto != 0,
		len(m.Interfaces) > 0 && !slices.Contains(m.Interfaces, c.Interface),
		len(m.UIDs)+len(m.GIDs) > 0 && !owned,
		len(m.Src) > 0 && !m.Src.Contains(src),
		m.NotSrc.Contains(src),
		!m.SrcIs.holds(src, c.Own),
		m.SrcPort != 0 && m.SrcPort != c.Src.Port(),
		len(m.Dst) > 0 && !m.Dst.Contains(dst),
		m.NotDst.Contains(dst),
		!m.DstIs.holds(dst, c.Own),
		len(m.DstPorts) > 0 && !m.DstPorts.Contains(c.Dst.Port()),
		m.NotDstPorts.Contains(c.Dst.Port()):
		return false
	}
	return true
}

func (l Locality) holds(a netip.Addr, own []netip.Addr) bool {
	if l == Anywhere {
		return true
	}
	return (loopback.Contains(a) || slices.Contains(own, a)) == (l == Local)
}
