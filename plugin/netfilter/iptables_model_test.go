package netfilter

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/preroute/preroute/plugin/redirect"
)

// The printed lines mean what the rules mean: a walk through the text, as the
// kernel walks it, decides as redirect.Decide does. That the kernel walks it so,
// the tests with real sockets show; this one reaches what they do not, such as
// long negated lists in every mix.
func TestIPTablesMeansTheRules(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	seen := map[string]int{}
	for range 1500 {
		p := parse(t, randomPolicy(rnd).String())
		rules := p.Rules()
		text := map[bool]tablesText{true: readRestore(t, RestoreInput(p, true)), false: readRestore(t, RestoreInput(p, false))}
		for range 60 {
			c := randomConn(rnd)
			want := redirect.Decide(rules, c)
			got := text[c.Dst.Addr().Is4()].walk(t, c)
			isDNS := want.Verdict == redirect.Redirect && want.Port == p.DNS.Port && c.Proto == redirect.ProtoUDP
			if got.verdict != want.Verdict || got.port != want.Port || got.zone != isDNS && !toProxyDNS(p, c) {
				t.Fatalf("policy %s\nconnection %+v\niptables: %+v\nDecide: %s\n%s", p, c, got, want, RestoreInput(p, c.Dst.Addr().Is4()))
			}
			seen[string(want.Verdict)+fmt.Sprint(got.zone)]++
		}
	}
	for _, kind := range []string{"passfalse", "redirectfalse", "redirecttrue", "tproxyfalse"} {
		if seen[kind] < 200 {
			t.Errorf("only %d connections were %s: the test has lost its teeth (%v)", seen[kind], kind, seen)
		}
	}
}

// toProxyDNS: datagrams from loopback to the DNS port itself are in the zone too,
// so that the proxy's answers, which are told by their port, find them there.
func toProxyDNS(p *redirect.Policy, c redirect.Conn) bool {
	lo := c.Dst.Addr() == netip.MustParseAddr("127.0.0.1") || c.Dst.Addr() == netip.IPv6Loopback()
	return p.DNS.Port != 0 && c.Proto == redirect.ProtoUDP && c.Chain == redirect.ChainOutput && c.Src.Addr() == c.Dst.Addr() && lo &&
		(c.Dst.Port() == p.DNS.Port || c.Src.Port() == p.DNS.Port)
}

type (
	tablesText map[string]map[string][][]string // table, chain, rules as words
	walked     struct {
		verdict redirect.Verdict
		port    uint16
		zone    bool
	}
)

func readRestore(t *testing.T, text string) tablesText {
	t.Helper()
	out := tablesText{}
	var table map[string][][]string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		words := words(line)
		switch {
		case line[0] == '*':
			table = map[string][][]string{}
			out[line[1:]] = table
		case line[0] == ':':
			table[words[0][1:]] = nil
		case words[0] == "-I":
			table[words[1]] = slices.Insert(table[words[1]], 0, words[3:])
		case words[0] == "-A":
			if _, ok := table[words[1]]; !ok {
				t.Fatalf("%s: no such chain", line)
			}
			table[words[1]] = append(table[words[1]], words[2:])
		case line != "COMMIT":
			t.Fatalf("%q", line)
		}
	}
	return out
}

func words(line string) []string {
	var out []string
	for line != "" {
		if line[0] != '"' {
			w, rest, _ := strings.Cut(line, " ")
			out, line = append(out, w), rest
			continue
		}
		end := 1
		for line[end] != '"' {
			if line[end] == '\\' {
				end++
			}
			end++
		}
		out, line = append(out, line[:end+1]), strings.TrimPrefix(line[end+1:], " ")
	}
	return out
}

// A packet is the first of a connection, on its way through the tables.
type packet struct {
	redirect.Conn
	arrives      bool // at an interface, else it leaves by one
	mark, ctmark uint64
	walked
}

// walk takes the connection through the hooks it meets.
func (tt tablesText) walk(t *testing.T, c redirect.Conn) walked {
	pk := &packet{Conn: c, walked: walked{verdict: redirect.Pass}}
	if c.Chain == redirect.ChainOutput {
		for _, table := range []string{tableRaw, tableMangle, tableNat} {
			tt.chain(t, table, "OUTPUT", pk)
		}
		if pk.mark&markToInbound == 0 {
			return pk.walked
		}
		pk.Interface = "lo" // and so it comes back
	}
	pk.arrives = true
	if tt.chain(t, tableMangle, "PREROUTING", pk); pk.verdict == redirect.Pass {
		tt.chain(t, tableNat, "PREROUTING", pk)
	}
	return pk.walked
}

// chain reports whether the packet met a verdict.
func (tt tablesText) chain(t *testing.T, table, name string, pk *packet) bool {
	for _, rule := range tt[table][name] {
		target, ok := match(t, rule, pk)
		if !ok {
			continue
		}
		num := func(i, base int) uint64 {
			n, err := strconv.ParseUint(strings.Split(strings.TrimPrefix(target[i], "0x"), "/")[0], base, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		switch {
		case target[0] == "-g":
			return tt.chain(t, table, target[1], pk)
		case target[1] == "RETURN":
			return false
		case target[1] == "REDIRECT":
			pk.verdict, pk.port = redirect.Redirect, uint16(num(3, 10))
			return true
		case target[1] == "TPROXY":
			pk.verdict, pk.port = redirect.TProxy, uint16(num(3, 10))
			return true
		case target[1] == "CT":
			pk.zone = true
		case target[1] == "MARK":
			pk.mark |= num(3, 16)
		case target[1] == "CONNMARK":
			pk.ctmark |= num(3, 16)
		default:
			if _, ours := tt[table][target[1]]; !ours {
				t.Fatalf("unknown target %q", target)
			}
			if tt.chain(t, table, target[1], pk) {
				return true
			}
		}
	}
	return false
}

// match returns a rule's target if the packet matches.
func match(t *testing.T, rule []string, pk *packet) (target []string, ok bool) {
	ok, not := true, false
	for i := 0; i < len(rule); i++ {
		var arg string
		if i+1 < len(rule) {
			arg = rule[i+1]
		}
		var holds bool
		switch rule[i] {
		case "!":
			not = true
			continue
		case "-j", "-g":
			return rule[i:], ok
		case "-m":
			i++
			continue
		case "--comment":
			holds = true
		case "-s":
			holds = netip.MustParsePrefix(arg).Contains(pk.Src.Addr())
		case "-d":
			holds = netip.MustParsePrefix(arg).Contains(pk.Dst.Addr())
		case "-i", "-o":
			if (rule[i] == "-i") != pk.arrives {
				t.Fatalf("%q in the wrong hook", rule)
			}
			holds = arg == pk.Interface
		case "-p":
			holds = arg == pk.Proto.String()
		case "--dport", "--dports":
			holds = inPorts(arg, pk.Dst.Port())
		case "--sport":
			holds = inPorts(arg, pk.Src.Port())
		case "--uid-owner":
			holds = arg == fmt.Sprint(pk.UID)
		case "--gid-owner":
			holds = arg == fmt.Sprint(pk.GID)
		case "--src-type":
			holds = isOwn(pk, pk.Src.Addr())
		case "--dst-type":
			holds = isOwn(pk, pk.Dst.Addr())
		case "--mark": // of the packet, or of the connection
			n, err := strconv.ParseUint(strings.TrimPrefix(strings.Split(arg, "/")[0], "0x"), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			of := pk.mark
			if rule[i-1] == "connmark" || rule[i-2] == "connmark" {
				of = pk.ctmark
			}
			holds = of&n == n
		case "--ctdir":
			holds = arg == "ORIGINAL"
		case "--ctstate":
			holds = arg == "NEW"
		case "--tcp-flags": // of a first packet
			holds = pk.Proto == redirect.ProtoTCP
			i++
		default:
			t.Fatalf("unknown word %q in %q", rule[i], rule)
		}
		ok, not = ok && holds != not, false
		i++
	}
	t.Fatalf("no target in %q", rule)
	return nil, false
}

func inPorts(list string, port uint16) bool {
	for item := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(item, ":")
		if !isRange {
			last = first
		}
		a, _ := strconv.Atoi(first)
		b, _ := strconv.Atoi(last)
		if a <= int(port) && int(port) <= b {
			return true
		}
	}
	return false
}

func isOwn(pk *packet, a netip.Addr) bool { return a.IsLoopback() || slices.Contains(pk.Own, a) }

var (
	modelAddrs = addrs("10.0.0.1", "10.0.0.2", "10.1.2.3", "192.0.2.1", "127.0.0.1", "127.0.0.6", "127.9.9.9", "8.8.8.8",
		"fd00::1", "fd00::2", "fd00:1::3", "2001:db8::1", "::1", "::6", "2620:fe::fe")
	modelOwn  = addrs("10.0.0.2", "fd00::2", "::6")
	modelNets = []string{"10.0.0.0/24", "10.1.0.0/16", "192.0.2.1/32", "8.0.0.0/7", "fd00::/64", "fd00:1::/32", "2001:db8::/32", "0.0.0.0/0", "::/0"}
	modelIDs  = []uint32{0, 7, 1000, 2102}
	modelPort = []uint16{1, 2, 22, 53, 80, 443, 8900, 8901, 8902, 15053, 40000, 65535}
)

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func pick[T any](rnd *rand.Rand, from []T) T { return from[rnd.IntN(len(from))] }

// some returns up to n items, often none.
func some[T any](rnd *rand.Rand, n int, item func() T) (out []T) {
	if rnd.IntN(2) == 0 {
		return nil
	}
	for range rnd.IntN(n + 1) {
		out = append(out, item())
	}
	return out
}

func randomPolicy(rnd *rand.Rand) *redirect.Policy {
	ids := func() []uint32 { return some(rnd, 2, func() uint32 { return pick(rnd, modelIDs) }) }
	nets := func() redirect.Nets {
		return some(rnd, 4, func() netip.Prefix { return netip.MustParsePrefix(pick(rnd, modelNets)) })
	}
	ports := func() redirect.Ports {
		return some(rnd, 24, func() redirect.PortRange {
			first := pick(rnd, modelPort)
			return redirect.PortRange{First: first, Last: first + uint16(rnd.IntN(min(3, 65536-int(first))))}
		})
	}
	p := &redirect.Policy{V: redirect.Version, Proxy: redirect.Proxy{UIDs: ids(), GIDs: ids(), Hairpin: rnd.IntN(2) == 0}}
	if rnd.IntN(4) > 0 {
		p.Inbound = redirect.Inbound{Port: 8901, Mode: redirect.ModeRedirect, Ports: ports(), ExceptPorts: ports(), ExceptSources: nets()}
		if rnd.IntN(2) == 0 {
			p.Inbound.Mode = redirect.ModeTProxy
		}
	}
	if rnd.IntN(4) > 0 {
		p.Outbound = redirect.Outbound{Port: 8900, Ports: ports(), ExceptPorts: ports(), Nets: nets(), ExceptNets: nets(), ExceptUIDs: ids()}
	}
	if rnd.IntN(2) > 0 {
		p.DNS.Port = 15053
	}
	p.ExceptInterfaces = some(rnd, 2, func() string { return pick(rnd, []string{"eth1", "net2"}) })
	return p
}

func randomConn(rnd *rand.Rand) redirect.Conn {
	is4 := rnd.IntN(2) == 0
	addr := func() netip.Addr {
		for {
			if a := pick(rnd, modelAddrs); a.Is4() == is4 {
				return a
			}
		}
	}
	c := redirect.Conn{
		Proto:     pick(rnd, []redirect.Proto{redirect.ProtoTCP, redirect.ProtoTCP, redirect.ProtoUDP}),
		Chain:     pick(rnd, []redirect.Chain{redirect.ChainOutput, redirect.ChainPrerouting}),
		Interface: pick(rnd, []string{"eth0", "eth0", "eth1", "net2"}),
		UID:       pick(rnd, modelIDs),
		GID:       pick(rnd, modelIDs),
		Src:       netip.AddrPortFrom(addr(), pick(rnd, []uint16{8901, 40001, 40002, 15053})),
		Dst:       netip.AddrPortFrom(addr(), pick(rnd, modelPort)+uint16(rnd.IntN(2))),
		Own:       modelOwn,
	}
	if rnd.IntN(4) == 0 {
		c.Dst = netip.AddrPortFrom(c.Dst.Addr(), 53)
	}
	if c.Chain == redirect.ChainPrerouting {
		c.UID, c.GID = 4242, 4242 // no socket of this pod
	}
	if isOwn(&packet{Conn: c}, c.Dst.Addr()) && c.Chain == redirect.ChainOutput {
		c.Interface = "lo"
	}
	return c
}
