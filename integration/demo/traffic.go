package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/preroute/preroute/integration/sandbox"
	"github.com/preroute/preroute/plugin/redirect"
)

// A scene is the demo's cast.
type scene struct {
	ctx   context.Context
	t     *term
	w     *world
	pod   *pod
	proxy *sidecar
	names int // of DNS queries, each its own
}

// A try is one connection, or query, made over both families.
type try struct {
	what  string
	proto string // tcp, or dns over udp or tcp: dns-udp, dns-tcp
	from  *sandbox.Netns
	uid   int
	to    func(family int, port uint16) netip.AddrPort
	port  uint16
	shown map[redirect.Verdict]string // what the sockets show of it
}

var families = []int{4, 6}

// traffic sends every kind of connection, and holds what Decide says of it
// against what the sockets saw.
func (s *scene) traffic() error {
	policy, err := redirect.Parse(demoPolicy)
	if err != nil {
		return err
	}
	rules := policy.Rules()
	loopback := func(family int, port uint16) netip.AddrPort {
		if family == 4 {
			return netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
		}
		return netip.AddrPortFrom(netip.IPv6Loopback(), port)
	}
	pod, world, w := s.pod.netns, s.w.netns, s.w
	shown := map[redirect.Verdict]string{redirect.Pass: "the server sees the client itself"}
	tries := []try{
		{"app → world:80", "tcp", pod, appUID, w.addr, 80, map[redirect.Verdict]string{redirect.Redirect: "told the original destination"}},
		{"root in the app → world:80", "tcp", pod, 0, w.addr, 80, map[redirect.Verdict]string{redirect.Redirect: "told the original destination"}},
		{"app → world:9443", "tcp", pod, appUID, w.addr, 9443, shown},
		{"app → an excepted net", "tcp", pod, appUID, w.excepted, 80, shown},
		{"proxy → world:80", "tcp", pod, proxyUID, w.addr, 80, shown},
		{"app → localhost:8080", "tcp", pod, appUID, loopback, 8080, nil},
		{"app → its own address:8080", "tcp", pod, appUID, s.pod.addr, 8080, nil},
		{"app's DNS, UDP → world:53", "dns-udp", pod, appUID, w.addr, 53, map[redirect.Verdict]string{redirect.Redirect: "answered as if by the world"}},
		{"app's DNS, TCP → world:53", "dns-tcp", pod, appUID, w.addr, 53, map[redirect.Verdict]string{redirect.Redirect: "answered as if by the world"}},
		{"proxy's DNS, UDP → world:53", "dns-udp", pod, proxyUID, w.addr, 53, shown},
		{"world → pod:8080", "tcp", world, 0, s.pod.addr, 8080, map[redirect.Verdict]string{redirect.Redirect: "sees the client's address"}},
		{"world → pod:8887", "tcp", world, 0, s.pod.addr, 8887, shown},
	}
	for _, try := range tries {
		if s.ctx.Err() != nil {
			return s.ctx.Err()
		}
		var happened string
		var verdict redirect.Verdict
		err := eachFamily(func(family int) error {
			d, err := s.once(rules, try, family)
			happened, verdict = d.String(), d.Verdict
			return err
		})
		s.t.check(err, try.what, happened, try.shown[verdict])
	}
	s.t.check(s.direct(), "world → pod:8901", "reaches the proxy, once (rule I3: the inbound port itself)", "no loop")
	s.proxy.stop()
	s.t.check(s.down(), "both ways, the proxy stopped", "is refused (row F1)", "never passed around the proxy")
	return s.ctx.Err()
}

// once makes the connection and compares.
func (s *scene) once(rules []redirect.Rule, try try, family int) (redirect.Decision, error) {
	to := try.to(family, try.port)
	local, got, err := s.send(try, to)
	conn := redirect.Conn{
		Proto: redirect.ProtoTCP, Chain: redirect.ChainOutput, Interface: "eth0",
		UID: uint32(try.uid), GID: uint32(try.uid), Src: local, Dst: to, Own: s.pod.own(),
	}
	if try.proto == "dns-udp" {
		conn.Proto = redirect.ProtoUDP
	}
	if try.from == s.w.netns {
		conn.Chain, conn.UID, conn.GID = redirect.ChainPrerouting, 0, 0
	}
	want := redirect.Decide(rules, conn)
	if err != nil {
		return want, fmt.Errorf("to %s: %w", to, err)
	}
	if got.verdict != want.Verdict || got.port != want.Port {
		return want, fmt.Errorf("to %s: by the rules it %s, but it %s", to, want, got)
	}
	return want, nil
}

// What became of a connection, as seen from both its ends.
type seen struct {
	verdict redirect.Verdict
	port    uint16 // the proxy's
}

func (s seen) String() string {
	if s.verdict == redirect.Pass {
		return "went past the proxy"
	}
	return fmt.Sprintf("went to the proxy's port %d", s.port)
}

// send makes the connection. Nobody stood in between when the server sees the
// client's own address; else the proxy must have logged it, with the original
// destination.
func (s *scene) send(try try, to netip.AddrPort) (netip.AddrPort, seen, error) {
	var name, line string
	var local netip.AddrPort
	var err error
	if network, isDNS := strings.CutPrefix(try.proto, "dns-"); isDNS {
		s.names++
		name = fmt.Sprintf("query-%d.example.", s.names)
		local, line, err = ask(try.from, try.uid, network, to, name)
	} else {
		local, line, err = dial(try.from, try.uid, to)
	}
	if err != nil {
		return local, seen{}, err
	}
	if _, peer, _ := strings.Cut(line, " "); peer == local.String() {
		return local, seen{verdict: redirect.Pass}, nil
	}
	e, err := s.proxy.await(func(e event) bool {
		if name != "" {
			return e.Event == "dns" && e.Name == name
		}
		return e.Event == "open" && e.Client == local.String()
	})
	if err != nil {
		return local, seen{}, err
	}
	if name == "" && e.Original != to.String() {
		return local, seen{}, fmt.Errorf("the proxy was told %s", e.Original)
	}
	return local, seen{redirect.Redirect, map[string]uint16{"outbound": 8900, "inbound": 8901, "udp": 15053, "tcp": 15053}[e.Direction]}, nil
}

// direct dials the inbound port itself: the proxy must see that nothing was
// redirected, and not dial on to itself.
func (s *scene) direct() error {
	return eachFamily(func(family int) error {
		local, line, err := dial(s.w.netns, 0, s.pod.addr(family, 8901))
		if err == nil {
			return fmt.Errorf("want the connection closed, got %q", line)
		}
		if !local.IsValid() {
			return err
		}
		_, err = s.proxy.await(func(e event) bool { return e.Event == "refused" && e.Client == local.String() })
		return err
	})
}

// down tries both ways with no proxy listening.
func (s *scene) down() error {
	return eachFamily(func(family int) error {
		for _, try := range []struct {
			from *sandbox.Netns
			to   netip.AddrPort
		}{{s.pod.netns, s.w.addr(family, 80)}, {s.w.netns, s.pod.addr(family, 8080)}} {
			if _, line, err := dial(try.from, 0, try.to); !errors.Is(err, syscall.ECONNREFUSED) {
				return fmt.Errorf("to %s: want it refused, got %q, %v", try.to, line, err)
			}
		}
		return nil
	})
}

// unmeshed shows a pod without the annotation: nothing was opened or made.
func (s *scene) unmeshed(p *pod) {
	err := eachFamily(func(family int) error {
		for _, try := range []try{
			{from: p.netns, uid: appUID, to: s.w.addr, port: 80},
			{from: s.w.netns, to: p.addr, port: 8080},
		} {
			to := try.to(family, try.port)
			local, line, err := dial(try.from, try.uid, to)
			if err != nil {
				return fmt.Errorf("to %s: %w", to, err)
			}
			if _, peer, _ := strings.Cut(line, " "); peer != local.String() {
				return fmt.Errorf("to %s: the server sees %s, not the client %s", to, peer, local)
			}
		}
		return nil
	})
	s.t.check(errors.Join(err, noTables(p.netns)), "a pod without a policy", "is left alone, both ways (row Z1)", "no table made in it")
}

func noTables(n *sandbox.Netns) error {
	return n.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		tables, err := c.ListTables()
		if err == nil && len(tables) > 0 {
			err = fmt.Errorf("there is a table %s in its namespace", tables[0].Name)
		}
		return err
	})
}

// refused shows a pod whose policy is wrong: it does not start, and the error
// is what kubectl describe pod would show.
func (s *scene) refused(rt *runtime) {
	const bad = `{"v":1,"outbound":{"port":8900,"exceptPorts":"53,*"}}`
	p, err := rt.addPod(s.ctx, "bad", bad)
	if p != nil {
		p.close()
	}
	var refusal *types.Error
	switch {
	case err == nil:
		err = errors.New("it was let in")
	case !errors.As(err, &refusal):
	case refusal.Code != types.ErrInvalidNetworkConfig:
		err = fmt.Errorf("want CNI error %d: %w", types.ErrInvalidNetworkConfig, err)
	case !strings.Contains(refusal.Msg+refusal.Details, policyAnnotation) || !strings.Contains(refusal.Msg+refusal.Details, "outbound.exceptPorts"):
		err = fmt.Errorf("the error names neither annotation nor field: %w", err)
	default:
		err = nil
	}
	s.t.check(err, `exceptPorts "53,*"`, fmt.Sprintf("does not start: CNI error %d", types.ErrInvalidNetworkConfig), "")
	if err == nil {
		s.t.fact("", "%s", strings.TrimSpace(refusal.Msg+" "+refusal.Details))
	}
}

// tools runs the pod-side commands as a person would.
func (s *scene) tools(rt *runtime, bin, tmp string) {
	s.t.check(rt.checkPod(s.ctx, s.pod), "the runtime's CHECK", "finds the policy in place", "")
	file := filepath.Join(tmp, "policy.json")
	if err := os.WriteFile(file, []byte(demoPolicy), 0o644); err != nil {
		s.t.check(err, "policy.json", "", "")
		return
	}
	preroute := filepath.Join(bin, "preroute")
	said := s.tool("preroute check", preroute, "check", "--policy", file, "--netns", s.pod.netns.Path(), "--backend", rt.backend)
	s.t.fact("", "%s", strings.Join(redirects(said), ", "))
	s.tool("preroute explain", preroute, "explain", "--policy", file, "--to", "198.51.100.7:443", "--uid", "1000")
}

// tool runs a command, prints the first line that it says, and returns the rest.
func (s *scene) tool(what, path string, args ...string) []string {
	var out bytes.Buffer
	cmd := exec.CommandContext(s.ctx, path, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	said := strings.Split(strings.TrimSpace(out.String()), "\n")
	if err != nil {
		err = fmt.Errorf("%w: %s", err, said[0])
	}
	s.t.check(err, what, said[0], "")
	return said[1:]
}

// redirects picks from what preroute check says the backend, and the counters
// of the rules that brought connections to the proxy.
func redirects(said []string) []string {
	var out []string
	for _, line := range said {
		line = strings.TrimSpace(line)
		count, rule, _ := strings.Cut(line, "  ")
		switch rule {
		case "O1 the app's TCP", "I1 TCP to the pod":
			out = append(out, count+" times "+rule)
		}
		if strings.HasPrefix(line, "backend: ") {
			out = append(out, line)
		}
	}
	return out
}

// leave deletes the pods and looks for what they left on the node.
func (s *scene) leave(rt *runtime, pods ...*pod) {
	var errs []error
	for _, p := range pods {
		errs = append(errs, rt.delPod(s.ctx, p), noTables(p.netns))
	}
	errs = append(errs, s.w.netns.Do(func() error {
		links, err := netlink.LinkList()
		if err == nil && len(links) != 1 {
			err = fmt.Errorf("%d links are left on the node, want lo alone", len(links))
		}
		return err
	}))
	s.t.check(errors.Join(errs...), "the runtime's DEL", "leaves no rule in the pods and no link on the node", "")
}

func eachFamily(fn func(family int) error) error {
	for _, family := range families {
		if err := fn(family); err != nil {
			return err
		}
	}
	return nil
}
