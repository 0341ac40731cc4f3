package main

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/preroute/preroute/plugin/redirect"
)

// preroute verify stands where the proxy will stand: it listens on the proxy's
// ports, which are free before the proxy starts, opens connections that the
// policy redirects, and looks whether they come out there. It needs no
// privilege, only a UID and GID that are not the proxy's.
//
// Outbound is proven with a connection to an address that nobody has. Inbound
// cannot be: nothing that a process sends to its own pod ever arrives at eth0.
// So the rules take one kind of connection inside the pod through the very chain
// that those from outside go through: one from the inbound port to one of the
// pod's own addresses (row V1 of the rules). What this leaves unproven is only
// that the prerouting hook enters that chain, which is written in the same
// transaction. With mode tproxy, where a listener would need CAP_NET_ADMIN, the
// proof is that such a connection to a port on which verify itself listens does
// not get through.

// probeTimeout bounds one connection: inside a pod it takes microseconds.
const probeTimeout = 2 * time.Second

// retryEvery is how often it looks again while it waits for a repair.
const retryEvery = 500 * time.Millisecond

func runVerify(args []string) int {
	fs := newFlags("verify", "[flags]", "Proves that this pod is redirected as "+policyEnv+" says: both directions, both families.")
	wait := fs.Duration("wait", time.Minute, "how `long` to wait for the node to repair a pod that is not redirected")
	if code, ok := parseFlags(fs, args); !ok {
		return code
	}
	p, err := policyFromEnv()
	if err != nil {
		return fail(exitUsage, "verify: %v", err)
	}
	if p.IsZero() {
		fmt.Println("preroute: verify: the policy redirects nothing, there is nothing to prove")
		return exitOK
	}
	v, err := newVerifier(p)
	if err != nil {
		return fail(exitFailed, "verify: %v", err)
	}
	defer v.close()
	deadline := time.Now().Add(*wait)
	for {
		wrong := v.round()
		if len(wrong) == 0 {
			fmt.Println("preroute: verify: " + strings.Join(v.proven, "; "))
			return exitOK
		}
		if time.Now().After(deadline) {
			return fail(exitNotBefore, "verify: this pod is not redirected as its policy says: %s\n"+
				"What to do: look at the node's preroute-installer (kubectl -n preroute-system get pods -o wide; preroute-installer doctor), then delete this pod,\n"+
				"so that it is made again; with the label preroute.io/ready=true in its nodeSelector it lands on a node that is ready.",
				strings.Join(wrong, "; "))
		}
		time.Sleep(min(retryEvery, max(0, time.Until(deadline))+time.Millisecond))
	}
}

type verifier struct {
	probes    []probe
	proven    []string
	listeners map[netip.AddrPort]net.Listener
	packets   map[netip.AddrPort]net.PacketConn
}

// newVerifier decides what to prove and takes the proxy's ports.
func newVerifier(p *redirect.Policy) (*verifier, error) {
	uid, gid := uint32(os.Getuid()), uint32(os.Getgid())
	if slices.Contains(p.Proxy.UIDs, uid) || slices.Contains(p.Proxy.GIDs, gid) {
		return nil, fmt.Errorf("uid %d, gid %d is the proxy's own, whose traffic is not redirected; run verify as another user", uid, gid)
	}
	own, err := ownAddresses()
	if err != nil {
		return nil, err
	}
	v := &verifier{listeners: map[netip.AddrPort]net.Listener{}, packets: map[netip.AddrPort]net.PacketConn{}}
	for _, is4 := range []bool{true, false} {
		v.plan(p, is4, own, uid, gid)
	}
	for _, pr := range v.probes {
		if err := v.listen(p, pr); err != nil {
			v.close()
			return nil, err
		}
	}
	if len(v.probes) == 0 {
		return nil, fmt.Errorf("nothing of this policy can be proven here: %s", strings.Join(v.proven, "; "))
	}
	return v, nil
}

func (v *verifier) close() {
	for _, l := range v.listeners {
		l.Close()
	}
	for _, l := range v.packets {
		l.Close()
	}
}

// ownAddresses are the pod's addresses beside loopback and link-local.
func ownAddresses() ([]netip.Addr, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("reading the pod's addresses: %w", err)
	}
	var own []netip.Addr
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && !p.Addr().IsLoopback() && !p.Addr().IsLinkLocalUnicast() && p.Addr() != passthrough6 {
			own = append(own, p.Addr().Unmap())
		}
	}
	return own, nil
}

// interfaceTo is the interface by which the pod sends to an address, "" when no
// route leads there. Connecting a UDP socket sends nothing.
func interfaceTo(a netip.Addr) string {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 9)))
	if err != nil {
		return ""
	}
	defer c.Close()
	from := c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
	if from == a {
		return "lo" // one of the pod's own
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		return ""
	}
	for _, i := range interfaces {
		addrs, _ := i.Addrs()
		for _, have := range addrs {
			if p, err := netip.ParsePrefix(have.String()); err == nil && p.Addr().Unmap() == from {
				return i.Name
			}
		}
	}
	return ""
}

var passthrough6 = netip.MustParseAddr("::6")

// plan adds the probes of one family.
func (v *verifier) plan(p *redirect.Policy, is4 bool, own []netip.Addr, uid, gid uint32) {
	family := "IPv6"
	if is4 {
		family = "IPv4"
	}
	i := slices.IndexFunc(own, func(a netip.Addr) bool { return a.Is4() == is4 })
	if i < 0 {
		v.proven = append(v.proven, family+": the pod has no address, nothing to prove")
		return
	}
	me, rules := own[i], p.Rules()
	app := redirect.Conn{Proto: redirect.ProtoTCP, Chain: redirect.ChainOutput, UID: uid, GID: gid, Own: own}
	// find looks for a destination that the rules send to the port.
	find := func(c redirect.Conn, row string, want uint16, addrs []netip.Addr, ports []uint16) (netip.AddrPort, bool) {
		for _, a := range addrs {
			c.Interface = interfaceTo(a)
			for _, port := range ports {
				c.Dst = netip.AddrPortFrom(a, port)
				if d := redirect.Decide(rules, c); d.Rule != nil && d.Rule.Row == row && d.Port == want {
					return c.Dst, true
				}
			}
		}
		return netip.AddrPort{}, false
	}
	add := func(found bool, pr probe) {
		if !found {
			v.proven = append(v.proven, pr.name+": the policy's exceptions leave nothing to prove it with")
			return
		}
		v.probes = append(v.probes, pr)
	}
	if want := p.Outbound.Port; want != 0 {
		to, ok := find(app, "O1", want, unusedAddrs(is4, p.Outbound.Nets), candidatePorts(p.Outbound.Ports))
		add(ok, probe{name: "outbound " + family, to: to, port: want})
	}
	if want := p.DNS.Port; want != 0 {
		for _, proto := range []redirect.Proto{redirect.ProtoTCP, redirect.ProtoUDP} {
			c := app
			c.Proto = proto
			to, ok := find(c, "D1", want, unusedAddrs(is4, nil), []uint16{53})
			add(ok, probe{name: fmt.Sprintf("DNS over %s, %s", strings.ToUpper(proto.String()), family), to: to, udp: proto == redirect.ProtoUDP, port: want})
		}
	}
	if want := p.Inbound.Port; want != 0 {
		c := app
		c.Src = netip.AddrPortFrom(me, want)
		row := "I1"
		if p.Inbound.Mode == redirect.ModeTProxy {
			row = "I4"
		}
		to, ok := find(c, row, want, []netip.Addr{me}, candidatePorts(p.Inbound.Ports))
		add(ok, probe{name: "inbound " + family, from: c.Src, to: to, port: want, closed: row == "I4"})
	}
}

// unusedAddrs are destinations that nobody has: the documentation networks of
// RFC 5737 and RFC 3849, and the benchmarking ones of RFC 2544 and RFC 5180;
// and where only some networks are redirected, an address of each.
func unusedAddrs(is4 bool, nets redirect.Nets) []netip.Addr {
	list := []string{"2001:db8::7072", "2001:2::7072", "3fff::7072"}
	if is4 {
		list = []string{"192.0.2.112", "198.51.100.112", "203.0.113.112", "198.18.112.114"}
	}
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	for _, n := range nets.Family(is4) {
		out = append(out, n.Addr(), n.Addr().Next())
	}
	return out
}

// candidatePorts are ports that a policy may redirect: the ends of the ranges
// it names, else some that exceptions seldom name.
func candidatePorts(ports redirect.Ports) []uint16 {
	var out []uint16
	for _, r := range ports {
		out = append(out, r.Last, r.First)
		for port := r.First; port != r.Last && len(out) < 64; port++ {
			out = append(out, port)
		}
	}
	if len(ports) == 0 {
		for port := uint16(20001); port < 20065; port++ {
			out = append(out, port)
		}
		out = append(out, 80, 443, 8080, 1024, 5000, 40000, 60000)
	}
	return out
}

// listen takes the place where a probe has to come out. The redirect in the
// output hook goes to the loopback address of the family.
func (v *verifier) listen(p *redirect.Policy, pr probe) error {
	at := netip.AddrPortFrom(netip.IPv6Loopback(), pr.port)
	if pr.to.Addr().Is4() {
		at = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), pr.port)
	}
	if pr.closed {
		at = pr.to // as the app would
	}
	explain := func(err error) error {
		return fmt.Errorf("listening on %s in the place of the proxy, to prove %s: %w; verify has to run before the sidecar", at, pr.name, err)
	}
	if pr.udp {
		if v.packets[at] != nil {
			return nil
		}
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		if err != nil {
			return explain(err)
		}
		v.packets[at] = c
		go echoPackets(c)
		return nil
	}
	if v.listeners[at] != nil {
		return nil
	}
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
	if err != nil {
		return explain(err)
	}
	v.listeners[at] = l
	go greet(l, pr.port)
	return nil
}

// round runs all probes and returns what is wrong.
func (v *verifier) round() []string {
	var wrong []string
	proven := v.proven
	for _, pr := range v.probes {
		if said, err := pr.run(); err != nil {
			wrong = append(wrong, pr.name+": "+err.Error())
		} else {
			proven = append(proven, pr.name+": "+said)
		}
	}
	if len(wrong) == 0 {
		v.proven = proven
	}
	return wrong
}
