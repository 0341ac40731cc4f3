package netns_test

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/preroute/preroute/plugin/redirect"
)

// The contract's table "What packets do" is tried as text tables, a connection
// a line:
//
//	row  who[@source]  protocol  destination:port  who gets it  [family]
//
// who is app (UID 1000), root, proxy (UID and GID 2102), gid (UID 1000, GID
// 2102), UID:GID, or outside (the world's end of the veth); source and
// destination are the names of addresses() below. Who gets it is the name of a
// server, with a ">" in front when it gets it by a redirect, original
// destination and all; without, both ends must see each other's own addresses.
// "nobody" is a refusal. Where a line ends in 4 or 6 it is for that family only.
//
// Each line is held against redirect.Decide too: what the model says of a
// connection and what the kernel did with it must be the same.
type line struct {
	text     string // as written
	row      string
	who, src string
	proto    string // tcp, or udp: a DNS question
	dst      string
	port     uint16
	want     string
	captured bool // want had a ">"
	only     string
}

func parseLines(t *testing.T, table string) []line {
	t.Helper()
	var lines []line
	for text := range strings.Lines(table) {
		f := strings.Fields(text)
		if len(f) == 0 {
			continue
		}
		if len(f) < 5 || len(f) > 6 {
			t.Fatalf("a bad line in a table: %q", text)
		}
		l := line{text: strings.Join(f, " "), row: f[0], proto: f[2]}
		l.who, l.src, _ = strings.Cut(f[1], "@")
		dst, port, _ := strings.Cut(f[3], ":")
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			t.Fatalf("a bad port in a table: %q", text)
		}
		l.dst, l.port = dst, uint16(n)
		l.want, l.captured = strings.CutPrefix(f[4], ">")
		if len(f) == 6 {
			l.only = f[5]
		}
		lines = append(lines, l)
	}
	return lines
}

// addresses are what the tables call them.
func addresses(family string) map[string]netip.Addr {
	pick := func(v4, v6 string) netip.Addr {
		if family == "4" {
			return netip.MustParseAddr(v4)
		}
		return netip.MustParseAddr(v6)
	}
	m := map[string]netip.Addr{
		"loop":        pick("127.0.0.1", "::1"),
		"pod":         pick(podIPv4.Addr().String(), podIPv6.Addr().String()),
		"alias":       pick("10.77.0.200", "fd00:77::200"),                          // a second address of the first interface
		"second":      pick(secondIPv4.Addr().String(), secondIPv6.Addr().String()), // of the second interface
		"gw":          pick(gwIPv4.Addr().String(), gwIPv6.Addr().String()),
		"far":         pick("198.51.100.9", "2001:db8:1::9"),
		"far2":        pick("198.51.100.200", "2001:db8:1:2::9"),
		"via2":        pick("203.0.113.9", "2001:db8:2::9"), // reached through the second interface
		"passthrough": pick("127.0.0.6", "::6"),
	}
	if family == "4" {
		m["loop2"] = netip.MustParseAddr("127.200.3.4")
	}
	return m
}

var ownNames = []string{"pod", "alias", "second"}

// A scenario is a policy and what it does.
type scenario struct {
	name   string
	policy string
	lines  string
	opts   []podOption
	// before and after run around ADD, where a pod needs more than newPod gives.
	before, after func(p *pod)
	families      string // "46" when empty
	dnsAddrs      []string
	down          bool // F1: the proxy is not listening, so what is redirected must fail
	twice         bool // ADD runs a second time
}

const (
	appPorts   = "53 80 443 8000 8080 8100 8101 8887 8894 8895 8896 8897"
	worldPorts = "53 80 443 8080 8900 8901 9000 9049 9050 9059 9060 9100 9101 15053"
)

func (s *scenario) run(t *testing.T, f flavour) {
	policy, err := redirect.Parse(s.policy)
	if err != nil {
		t.Fatal(err)
	}
	p := newPod(t, s.opts...)
	p.addAddress(p.ifName, netip.MustParsePrefix("10.77.0.200/24"))
	if !p.noIPv6 {
		p.addAddress(p.ifName, netip.MustParsePrefix("fd00:77::200/64"))
	}
	if s.before != nil {
		s.before(p)
	}
	p.mustAdd(s.policy, using(f))
	if s.twice {
		p.mustAdd(s.policy, using(f))
	}
	if s.after != nil {
		s.after(p)
	}
	s.startServers(p, policy)

	families := s.families
	if families == "" {
		families = "46"
	}
	lines := parseLines(t, s.lines)
	rules := policy.Rules()
	for _, family := range strings.Split(families, "") {
		addrs := addresses(family)
		// All lines at once: they are connections of their own, and those that
		// must time out do so together.
		waits := make([]func() (answer, error), len(lines))
		for i, l := range lines {
			if l.only == "" || l.only == family {
				waits[i] = p.clientOf(t, l.who).start(s.request(t, l, addrs, family))
			}
		}
		for i, l := range lines {
			if waits[i] == nil {
				continue
			}
			ans, err := waits[i]()
			if err != nil {
				t.Errorf("IPv%s, %s: %v", family, l.text, err)
				continue
			}
			got := ans.Outcomes[0]
			if err := s.judge(l, addrs, policy, got); err != nil {
				t.Errorf("IPv%s, %s: %v\ngot %+v", family, l.text, err, got)
			}
			if err := judgeModel(t, l, addrs, policy, rules, p, got); err != nil {
				t.Errorf("IPv%s, %s: %v\nrules:\n%s", family, l.text, err, redirect.Print(rules))
			}
		}
	}
	if t.Failed() {
		t.Logf("policy: %s\n%s", s.policy, p.dump())
	}
}

func (s *scenario) startServers(p *pod, policy *redirect.Policy) {
	p.t.Helper()
	serve := func(a *agent, r request, ports string) {
		for port := range strings.FieldsSeq(ports) {
			addr := ":" + port
			families := []string{"4", "6"}
			if p.noIPv6 && a != p.outside() {
				families = families[:1]
			}
			for _, family := range families {
				q := r
				q.Net, q.Addr = r.Net+family, addr
				a.do(q)
			}
		}
	}
	serve(p.outside(), request{Op: "listen", Who: "world", Net: "tcp"}, worldPorts)
	serve(p.outside(), request{Op: "dns", Who: "world", Net: "udp", PacketInfo: true}, "53 5353")
	app := p.agent(appOwner)
	serve(app, request{Op: "listen", Who: "app", Net: "tcp"}, appPorts)
	serve(app, request{Op: "dns", Who: "app", Net: "udp", PacketInfo: true}, "53")
	if s.down {
		return
	}
	proxy := p.agent(proxyOwner)
	tproxy := policy.Inbound.Mode == redirect.ModeTProxy
	serve(proxy, request{Op: "listen", Who: "proxy-out", Net: "tcp"}, "8900")
	serve(proxy, request{Op: "listen", Who: "proxy-in", Net: "tcp", Transparent: tproxy}, "8901")
	if policy.DNS.Port == 0 {
		return
	}
	serve(proxy, request{Op: "listen", Who: "dns-proxy", Net: "tcp"}, "15053")
	if s.dnsAddrs == nil {
		serve(proxy, request{Op: "dns", Who: "dns-proxy", Net: "udp"}, "15053")
	} else {
		proxy.serve(request{Op: "dns", Who: "dns-proxy", Net: "udp"}, s.dnsAddrs...)
	}
}

func (p *pod) clientOf(t *testing.T, who string) *agent {
	t.Helper()
	if who == "outside" {
		return p.outside()
	}
	return p.agent(ownerNamed(t, who))
}

func ownerNamed(t *testing.T, who string) owner {
	t.Helper()
	switch who {
	case "app":
		return appOwner
	case "root":
		return rootOwner
	case "proxy":
		return proxyOwner
	case "gid":
		return gidOwner
	}
	var o owner
	if _, err := fmt.Sscanf(who, "%d:%d", &o.uid, &o.gid); err != nil {
		t.Fatalf("a table names %q as the owner: want UID:GID", who)
	}
	return o
}

func (s *scenario) request(t *testing.T, l line, addrs map[string]netip.Addr, family string) request {
	t.Helper()
	dst, ok := addrs[l.dst]
	if !ok {
		t.Fatalf("a table names the address %q", l.dst)
	}
	r := request{Net: l.proto + family, Remotes: []string{netip.AddrPortFrom(dst, l.port).String()}}
	if l.src != "" {
		src, ok := addrs[l.src]
		if !ok {
			t.Fatalf("a table names the address %q", l.src)
		}
		r.Local = netip.AddrPortFrom(src, 0).String()
	}
	switch l.proto {
	case "tcp":
		r.Op, r.Say = "dial", "describe"
	case "udp":
		r.Op = "query"
	default:
		t.Fatalf("a table names the protocol %q", l.proto)
	}
	if s.down && l.captured {
		// Long enough: were it passed around the proxy, it would be answered at once.
		r.TimeoutMS = 1000
	}
	return r
}

// judge says what is wrong with an outcome.
func (s *scenario) judge(l line, addrs map[string]netip.Addr, policy *redirect.Policy, got outcome) error {
	dst := netip.AddrPortFrom(addrs[l.dst], l.port).String()
	if l.want == "nobody" || (s.down && l.captured) {
		if got.View.Who != "" || (got.Err != "refused" && got.Err != "timeout") {
			return fmt.Errorf("F1: want it refused or timed out")
		}
		return nil
	}
	if got.Err != "" {
		return fmt.Errorf("failed: %s", got.Err)
	}
	v := got.View
	if v.Who != l.want {
		return fmt.Errorf("%s got it", v.Who)
	}
	if l.proto == "udp" {
		if got.From != dst {
			return fmt.Errorf("the answer came from %s", got.From)
		}
		if !l.captured && v.Peer != got.Local {
			return fmt.Errorf("the server sees %s as its peer, the client is %s", v.Peer, got.Local)
		}
		return nil
	}
	tproxied := l.want == "proxy-in" && policy.Inbound.Mode == redirect.ModeTProxy
	// Two connections from one port to two servers come to one and the same
	// after a redirect: then the kernel gives one of them another port.
	samePeer := v.Peer == got.Local || (l.captured && !tproxied && sameHost(v.Peer, got.Local))
	switch {
	case !samePeer:
		return fmt.Errorf("the server sees %s as its peer, the client is %s", v.Peer, got.Local)
	case l.captured && !tproxied && v.Orig != dst:
		return fmt.Errorf("the original destination reads %q", v.Orig)
	case (!l.captured || tproxied) && v.Local != dst:
		return fmt.Errorf("the server's own address reads %s", v.Local)
	case (!l.captured || tproxied) && v.Orig != "" && v.Orig != dst:
		return fmt.Errorf("conntrack has it redirected from %s", v.Orig)
	}
	return nil
}

// judgeModel holds redirect.Decide against the line.
func judgeModel(t *testing.T, l line, addrs map[string]netip.Addr, policy *redirect.Policy, rules []redirect.Rule, p *pod, got outcome) error {
	dst := addrs[l.dst]
	c := redirect.Conn{
		Proto:     redirect.ProtoTCP,
		Chain:     redirect.ChainOutput,
		Interface: p.ifName,
		Dst:       netip.AddrPortFrom(dst, l.port),
	}
	if l.proto == "udp" {
		c.Proto = redirect.ProtoUDP
	}
	local := dst.IsLoopback()
	for _, name := range ownNames {
		c.Own = append(c.Own, addrs[name])
		local = local || dst == addrs[name]
	}
	toSecond := l.dst == "via2" || l.dst == "second"
	switch {
	case l.who == "outside":
		c.Chain = redirect.ChainPrerouting
		local = false
	default:
		o := ownerNamed(t, l.who)
		c.UID, c.GID = o.uid, o.gid
	}
	switch {
	case local:
		c.Interface = "lo"
	case toSecond && p.second != "":
		c.Interface = p.second
	}
	if src, err := netip.ParseAddrPort(got.Local); err == nil && src.Addr().IsValid() && !src.Addr().IsUnspecified() {
		c.Src = src
	} else {
		// A refused connection does not tell its source.
		a := addrs["pod"]
		switch {
		case l.src != "":
			a = addrs[l.src]
		case local:
			a = dst
		case l.who == "outside":
			a = addrs["gw"]
		}
		c.Src = netip.AddrPortFrom(a, 40000)
	}
	want := redirect.Decision{Verdict: redirect.Pass}
	if l.captured {
		want.Verdict = redirect.Redirect
		switch l.want {
		case "proxy-out":
			want.Port = policy.Outbound.Port
		case "dns-proxy":
			want.Port = policy.DNS.Port
		case "proxy-in":
			want.Port = policy.Inbound.Port
			if policy.Inbound.Mode == redirect.ModeTProxy {
				want.Verdict = redirect.TProxy
			}
		}
	}
	if d := redirect.Decide(rules, c); d.Verdict != want.Verdict || d.Port != want.Port {
		return fmt.Errorf("the model says it %s", d)
	}
	return nil
}
