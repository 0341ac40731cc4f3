package redirect_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/preroute/preroute/plugin/redirect"
)

// The properties are tried on policies and connections that are made up, the
// same ones on each run. Every set is drawn from few values, so that
// connections hit the policies' edges often.
const (
	policies        = 400
	connsEachPolicy = 200
)

func forAll(t *testing.T, property func(t *testing.T, p *redirect.Policy, rules []redirect.Rule, c redirect.Conn)) {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	for range policies {
		p := somePolicy(r)
		rules := p.Rules()
		for range connsEachPolicy {
			property(t, p, rules, someConn(r))
			if t.Failed() {
				return
			}
		}
	}
}

var (
	somePorts  = []uint16{1, 22, 53, 79, 80, 81, 443, 8900, 8901, 65534, 65535}
	someRanges = []string{"1", "22", "53", "80", "79-81", "443", "1-65535", "8900-8901", "65535"}
	someIDs    = []uint32{0, 1, 1000, 2102, 2103, redirect.MaxID}
	someNets4  = []string{"0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "192.0.2.0/24", "192.0.2.9/32"}
	someNets6  = []string{"::/0", "fd00::/8", "2001:db8::/32", "2001:db8::9/128"}
	someAddrs4 = []string{"10.1.0.5", "127.0.0.1", "127.0.0.6", "192.0.2.9", "192.0.2.10", "10.1.9.9", "10.200.0.1", "203.0.113.1"}
	someAddrs6 = []string{"fd00:1::5", "::1", "::6", "2001:db8::9", "2001:db8::a", "fd00:9::9", "2001:db9::1"}
	someIfs    = []string{"eth0", "eth1", "lo", ""}
)

func one[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

// some draws none most of the time, else up to three.
func some[T any](r *rand.Rand, from []T) []T {
	if r.IntN(2) == 0 {
		return nil
	}
	out := make([]T, 1+r.IntN(3))
	for i := range out {
		out[i] = one(r, from)
	}
	return out
}

func someSet(r *rand.Rand) redirect.Ports {
	var ps redirect.Ports
	for _, text := range some(r, someRanges) {
		p, err := redirect.ParsePorts(text)
		if err != nil {
			panic(err)
		}
		ps = append(ps, p...)
	}
	ps, err := redirect.ParsePorts(ps.String()) // sorted and merged
	if err != nil {
		panic(err)
	}
	return ps
}

func someNets(r *rand.Rand) redirect.Nets {
	var ns redirect.Nets
	for _, text := range some(r, slices.Concat(someNets4, someNets6)) {
		ns = append(ns, netip.MustParsePrefix(text))
	}
	return ns
}

func somePolicy(r *rand.Rand) *redirect.Policy {
	port := func(n uint16) uint16 {
		if r.IntN(4) == 0 {
			return 0
		}
		return n
	}
	return &redirect.Policy{
		V:     redirect.Version,
		Proxy: redirect.Proxy{UIDs: some(r, someIDs), GIDs: some(r, someIDs), Hairpin: r.IntN(2) == 0},
		Inbound: redirect.Inbound{
			Port: port(8901), Mode: one(r, []redirect.Mode{"", redirect.ModeRedirect, redirect.ModeTProxy}),
			Ports: someSet(r), ExceptPorts: someSet(r), ExceptSources: someNets(r),
		},
		Outbound: redirect.Outbound{
			Port: port(8900), Ports: someSet(r), ExceptPorts: someSet(r),
			Nets: someNets(r), ExceptNets: someNets(r), ExceptUIDs: some(r, someIDs),
		},
		DNS:              redirect.DNS{Port: port(15053)},
		ExceptInterfaces: some(r, []string{"eth1", "eth2"}),
	}
}

func someConn(r *rand.Rand) redirect.Conn {
	addrs := one(r, [][]string{someAddrs4, someAddrs6})
	end := func() netip.AddrPort {
		return netip.AddrPortFrom(netip.MustParseAddr(one(r, addrs)), one(r, somePorts))
	}
	return redirect.Conn{
		Proto:     one(r, []redirect.Proto{redirect.ProtoTCP, redirect.ProtoTCP, redirect.ProtoUDP}),
		Chain:     one(r, []redirect.Chain{redirect.ChainOutput, redirect.ChainPrerouting}),
		Interface: one(r, someIfs),
		UID:       one(r, someIDs), GID: one(r, someIDs),
		Src: end(), Dst: end(), Own: podAddrs,
	}
}

func local(a netip.Addr) bool { return a.IsLoopback() || slices.Contains(podAddrs, a) }

// TestDecideAsTheContractSays holds Decide(Rules()) against the contract's
// table, written down a second time as a person reads it.
func TestDecideAsTheContractSays(t *testing.T) {
	seen := map[redirect.Verdict]int{}
	forAll(t, func(t *testing.T, p *redirect.Policy, rules []redirect.Rule, c redirect.Conn) {
		d := redirect.Decide(rules, c)
		seen[d.Verdict]++
		verdict, port := table(p, c)
		if d.Verdict != verdict || d.Port != port {
			t.Errorf("%s\n%+v\n%s\nwant %s %d; rules:\n%s", p, c, d, verdict, port, redirect.Print(rules))
		}
	})
	for _, v := range []redirect.Verdict{redirect.Pass, redirect.Redirect, redirect.TProxy} {
		if seen[v] < policies {
			t.Errorf("%d connections were decided %q: too few to say anything", seen[v], v)
		}
	}
}

// table is the contract's table "What packets do", for TCP and DNS.
func table(p *redirect.Policy, c redirect.Conn) (redirect.Verdict, uint16) {
	dst, port := c.Dst.Addr(), c.Dst.Port()
	proxy := slices.Contains(p.Proxy.UIDs, c.UID) || slices.Contains(p.Proxy.GIDs, c.GID)
	tcp := c.Proto == redirect.ProtoTCP
	if slices.Contains(p.ExceptInterfaces, c.Interface) { // I5
		return redirect.Pass, 0
	}
	if c.Chain == redirect.ChainPrerouting {
		if !tcp || c.Interface == "lo" || !local(dst) {
			return redirect.Pass, 0
		}
		return tableInbound(p, c)
	}
	if dst.IsLoopback() { // O3
		return redirect.Pass, 0
	}
	ownToOwn := tcp && p.Inbound.Port != 0 && local(dst) && local(c.Src.Addr())
	if ownToOwn && c.Src.Port() == p.Inbound.Port { // the probe of preroute verify
		return tableInbound(p, c)
	}
	if proxy {
		from6 := c.Src.Addr() == netip.MustParseAddr("127.0.0.6") || c.Src.Addr() == netip.MustParseAddr("::6")
		if ownToOwn && p.Proxy.Hairpin && !from6 { // O5
			return tableInbound(p, c)
		}
		return redirect.Pass, 0 // O2, D2
	}
	o := &p.Outbound
	switch {
	case local(dst), // O4
		slices.Contains(o.ExceptUIDs, c.UID), o.ExceptNets.Contains(dst): // O6
	case p.DNS.Port != 0 && port == 53: // D1
		return redirect.Redirect, p.DNS.Port
	case !tcp || o.Port == 0,
		o.ExceptPorts.Contains(port), // O6
		len(o.Nets) > 0 && !o.Nets.Contains(dst),
		len(o.Ports) > 0 && !o.Ports.Contains(port):
	default: // O1
		return redirect.Redirect, o.Port
	}
	return redirect.Pass, 0
}

func tableInbound(p *redirect.Policy, c redirect.Conn) (redirect.Verdict, uint16) {
	in, port := &p.Inbound, c.Dst.Port()
	switch {
	case in.Port == 0, port == in.Port, // I3
		in.ExceptPorts.Contains(port), in.ExceptSources.Contains(c.Src.Addr()), // I2
		len(in.Ports) > 0 && !in.Ports.Contains(port):
		return redirect.Pass, 0
	case in.Mode == redirect.ModeTProxy: // I4
		return redirect.TProxy, in.Port
	}
	return redirect.Redirect, in.Port // I1
}

// TestExceptionsBeatInclusions adds to a policy the exception for one connection,
// which then passes, whatever else the policy says.
func TestExceptionsBeatInclusions(t *testing.T) {
	redirected := 0
	forAll(t, func(t *testing.T, p *redirect.Policy, rules []redirect.Rule, c redirect.Conn) {
		d := redirect.Decide(rules, c)
		if d.Verdict == redirect.Pass {
			return
		}
		redirected++
		for name, q := range exceptionsFor(p, d, c) {
			if got := redirect.Decide(q.Rules(), c); got.Verdict != redirect.Pass {
				t.Errorf("%s\nwith an exception by %s\n%+v\n%s", p, name, c, got)
			}
		}
	})
	if redirected < policies {
		t.Errorf("%d connections were redirected: too few to say anything", redirected)
	}
}

func exceptionsFor(p *redirect.Policy, d redirect.Decision, c redirect.Conn) map[string]*redirect.Policy {
	out := map[string]*redirect.Policy{}
	except := func(by string, change func(q *redirect.Policy)) {
		q := *p
		change(&q)
		out[by] = &q
	}
	host := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
	port, err := redirect.ParsePorts(fmt.Sprint(c.Dst.Port()))
	if err != nil {
		panic(err)
	}
	if d.Rule.Chain == redirect.ChainInbound {
		except("port", func(q *redirect.Policy) { q.Inbound.ExceptPorts = port })
		except("source", func(q *redirect.Policy) { q.Inbound.ExceptSources = redirect.Nets{host(c.Src.Addr())} })
	} else {
		if d.Rule.Row != "D1" {
			except("port", func(q *redirect.Policy) { q.Outbound.ExceptPorts = port })
		}
		except("network", func(q *redirect.Policy) { q.Outbound.ExceptNets = redirect.Nets{host(c.Dst.Addr())} })
		except("UID", func(q *redirect.Policy) { q.Outbound.ExceptUIDs = []uint32{c.UID} })
	}
	if c.Interface != "" {
		except("interface", func(q *redirect.Policy) { q.ExceptInterfaces = []string{c.Interface} })
	}
	return out
}

// TestFamiliesAlike maps a policy and a connection from IPv4 to IPv6, address by
// address, and expects the same fate.
func TestFamiliesAlike(t *testing.T) {
	toIPv6 := func(a netip.Addr) netip.Addr {
		switch {
		case a == podAddrs[0]:
			return podAddrs[1]
		case a == netip.MustParseAddr("127.0.0.6"):
			return netip.MustParseAddr("::6")
		case a.IsLoopback():
			return netip.IPv6Loopback()
		}
		b := a.As4()
		return netip.AddrFrom16([16]byte{0: 0x20, 1: 0x01, 12: b[0], 13: b[1], 14: b[2], 15: b[3]})
	}
	// 10.0.0.0/8 would hold the pod's own address in one family only.
	netsToIPv6 := func(ns redirect.Nets) (v4, v6 redirect.Nets) {
		for _, n := range ns {
			if n.Addr().Is4() && !n.Contains(podAddrs[0]) {
				v4 = append(v4, n)
				v6 = append(v6, netip.PrefixFrom(toIPv6(n.Addr()), n.Bits()+96))
			}
		}
		return v4, v6
	}
	tried := 0
	forAll(t, func(t *testing.T, p *redirect.Policy, _ []redirect.Rule, c redirect.Conn) {
		passthrough := c.Src.Addr() == netip.MustParseAddr("127.0.0.6") || c.Dst.Addr() == netip.MustParseAddr("127.0.0.6")
		// ::6 is no loopback address, 127.0.0.6 is: that is the one difference.
		if !c.Src.Addr().Is4() || passthrough {
			return
		}
		tried++
		p4, p6 := *p, *p
		p4.Outbound.Nets, p6.Outbound.Nets = netsToIPv6(p.Outbound.Nets)
		p4.Outbound.ExceptNets, p6.Outbound.ExceptNets = netsToIPv6(p.Outbound.ExceptNets)
		p4.Inbound.ExceptSources, p6.Inbound.ExceptSources = netsToIPv6(p.Inbound.ExceptSources)
		c6 := c
		c6.Src = netip.AddrPortFrom(toIPv6(c.Src.Addr()), c.Src.Port())
		c6.Dst = netip.AddrPortFrom(toIPv6(c.Dst.Addr()), c.Dst.Port())
		d4, d6 := redirect.Decide(p4.Rules(), c), redirect.Decide(p6.Rules(), c6)
		if d4.Verdict != d6.Verdict || d4.Port != d6.Port {
			t.Errorf("%s\n%+v\n%s\n%s\n%+v\n%s", &p4, c, d4, &p6, c6, d6)
		}
	})
	if tried < policies {
		t.Errorf("%d connections were tried: too few to say anything", tried)
	}
}
