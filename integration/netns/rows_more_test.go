package netns_test

import (
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"
)

// What a pod passes on for others, as one that runs virtual machines or
// containers of its own does, is neither the app's nor addressed to the pod:
// it is left alone. What those others send to the pod itself comes from outside.
func TestForwardedTraffic(t *testing.T) {
	for _, mode := range []string{"redirect", "tproxy"} {
		t.Run(mode, func(t *testing.T) {
			policy := `{"v":1,"proxy":{"uids":[2102],"hairpin":true},"inbound":{"port":8901,"mode":"` + mode + `"},"outbound":{"port":8900},"dns":{"port":15053}}`
			forBoth(t, policy, nil, func(t *testing.T, p *pod, family string) {
				behind := p.path + "-behind"
				if family == "4" {
					p.makeBehind(t, behind)
				}
				inner, port := p.agentIn(behind, rootOwner), "80"
				addr := map[string]string{"4": "10.99.0.2", "6": "fd00:99::2"}[family]
				gate := map[string]string{"4": "10.99.0.1", "6": "fd00:99::1"}[family]
				inner.serve(request{Op: "listen", Who: "behind", Net: "tcp"}, hostPort(addr, port))
				for _, c := range []struct {
					from *agent
					to   string
					want string
				}{
					{p.outside(), hostPort(addr, port), "behind"},
					{inner, at(family, "far", port), "world"},
					{inner, hostPort(gate, port), "proxy-in"},
					{inner, at(family, "pod", port), "proxy-in"},
				} {
					got := c.from.do(request{Op: "dial", Net: "tcp" + family, Remotes: []string{c.to}, Say: "describe"}).Outcomes[0]
					if got.Err != "" || got.View.Who != c.want || got.View.Peer != got.Local {
						t.Errorf("IPv%s, to %s: want %s, got %+v", family, c.to, c.want, got)
					}
				}
				got := inner.do(request{Op: "query", Net: "udp" + family, Remotes: []string{at(family, "far", "53")}}).Outcomes[0]
				if got.Err != "" || got.View.Who != "world" || got.View.Peer != got.Local {
					t.Errorf("IPv%s, DNS: want world, got %+v", family, got)
				}
			})
		})
	}
}

// makeBehind makes a namespace that is reached through the pod only.
func (p *pod) makeBehind(t *testing.T, path string) {
	t.Helper()
	name := filepath.Base(path)
	if err := makeNetns(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.DeleteNamed(name); err != nil {
			t.Errorf("removing %s: %v", path, err)
		}
	})
	p.sysctl("net/ipv4/ip_forward", "1")
	p.sysctl("net/ipv6/conf/all/forwarding", "1")
	p.exec("ip", "link", "add", "behind0", "type", "veth", "peer", "name", "eth0", "netns", name)
	p.exec("ip", "address", "add", "10.99.0.1/24", "dev", "behind0")
	p.exec("ip", "address", "add", "fd00:99::1/64", "dev", "behind0", "nodad")
	p.exec("ip", "link", "set", "behind0", "up")
	for _, c := range []struct {
		path string
		args []string
	}{
		{path, []string{"address", "add", "10.99.0.2/24", "dev", "eth0"}},
		{path, []string{"address", "add", "fd00:99::2/64", "dev", "eth0", "nodad"}},
		{path, []string{"link", "set", "eth0", "up"}},
		{path, []string{"route", "add", "default", "via", "10.99.0.1"}},
		{path, []string{"-6", "route", "add", "default", "via", "fd00:99::1"}},
		{p.world, []string{"route", "add", "10.99.0.0/24", "via", podIPv4.Addr().String()}},
		{p.world, []string{"-6", "route", "add", "fd00:99::/64", "via", podIPv6.Addr().String()}},
	} {
		if _, err := execIn(c.path, "", "ip", c.args...); err != nil {
			t.Fatal(err)
		}
	}
}

// Proxies that listen on one socket for both families, as Envoy and Go do by
// default, and on loopback only for what the app sends.
func TestHowTheProxyListens(t *testing.T) {
	for _, mode := range []string{"redirect", "tproxy"} {
		t.Run(mode, func(t *testing.T) {
			policy := `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"mode":"` + mode + `"},"outbound":{"port":8900}}`
			forBoth(t, policy, nil, func(t *testing.T, p *pod, family string) {
				proxy := p.agent(proxyOwner)
				proxy.do(request{Op: "close", Who: "proxy-in"})
				proxy.do(request{Op: "close", Who: "proxy-out"})
				proxy.do(request{Op: "listen", Who: "proxy-in", Net: "tcp", Addr: ":8901", Transparent: mode == "tproxy"})
				proxy.do(request{Op: "listen", Who: "proxy-out", Net: "tcp", Addr: ":8900"})
				both := func(how string) {
					t.Helper()
					for _, c := range []struct {
						from     *agent
						to, want string
					}{
						{p.agent(appOwner), at(family, "far", "80"), "proxy-out"},
						{p.outside(), at(family, "pod", "80"), "proxy-in"},
					} {
						got := c.from.do(request{Op: "dial", Net: "tcp" + family, Remotes: []string{c.to}, Say: "describe"}).Outcomes[0]
						dst := got.View.Orig
						if mode == "tproxy" && c.want == "proxy-in" {
							dst = got.View.Local
						}
						if got.Err != "" || got.View.Who != c.want || dst != c.to {
							t.Errorf("IPv%s, the proxy listens on %s: to %s: got %+v", family, how, c.to, got)
						}
					}
				}
				both("one socket")
				proxy.do(request{Op: "close", Who: "proxy-out"})
				proxy.serve(request{Op: "listen", Who: "proxy-out", Net: "tcp"}, "127.0.0.1:8900", "[::1]:8900")
				both("loopback")
				proxy.do(request{Op: "close", Who: "proxy-out"})
				proxy.do(request{Op: "close", Who: "proxy-in"})
			})
		})
	}
}

// A limit: the kernel gives a socket that is bound to an interface no packet that
// comes by lo, where a proxy in the pod answers; connections to IPv6 link-local
// addresses are bound so. They fail, and are not passed around the proxy. What
// is excepted works as ever.
func TestSocketsBoundToAnInterface(t *testing.T) {
	const policy = `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901},"outbound":{"port":8900,"exceptPorts":"9050"},"dns":{"port":15053}}`
	forBoth(t, policy, nil, func(t *testing.T, p *pod, family string) {
		app, proxy := p.agent(appOwner), p.agent(proxyOwner)
		tcp := func(a *agent, to string) outcome {
			return a.do(request{Op: "dial", Net: "tcp" + family, Remotes: []string{to}, Say: "describe", Device: "eth0", TimeoutMS: 500}).Outcomes[0]
		}
		fails := func(what string, got outcome) {
			t.Helper()
			if got.View.Who != "" || (got.Err != "timeout" && got.Err != "refused") {
				t.Errorf("IPv%s, %s: want it refused or timed out, got %+v", family, what, got)
			}
		}
		arrives := func(what, who string, got outcome) {
			t.Helper()
			if got.Err != "" || got.View.Who != who {
				t.Errorf("IPv%s, %s: want %s, got %+v", family, what, who, got)
			}
		}
		fails("the app, bound to eth0", tcp(app, at(family, "far", "80")))
		fails("a query, bound to eth0", app.do(request{Op: "query", Net: "udp" + family, Remotes: []string{at(family, "far", "53")}, Device: "eth0", TimeoutMS: 500}).Outcomes[0])
		arrives("the app to an excepted port, bound to eth0", "world", tcp(app, at(family, "far", "9050")))
		arrives("the proxy, bound to eth0", "world", tcp(proxy, at(family, "far", "80")))
		if family == "4" {
			return
		}
		fails("the app to a link-local address", tcp(app, linkLocal(t, p.world, "world0", "eth0")))
		arrives("the proxy to a link-local address", "world", tcp(proxy, linkLocal(t, p.world, "world0", "eth0")))
		in := p.outside().do(request{Op: "dial", Net: "tcp6", Remotes: []string{linkLocal(t, p.path, "eth0", "world0")}, Say: "describe"}).Outcomes[0]
		arrives("from outside to a link-local address", "proxy-in", in)
	})
}

// linkLocal is port 80 at the link-local address of an interface, as the other
// end of the wire, whose interface is via, calls it. The kernel gives it within
// a second or so of setting the link up.
func linkLocal(t *testing.T, path, ifName, via string) string {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		out, err := execIn(path, "", "ip", "-6", "-oneline", "address", "show", "dev", ifName, "scope", "link")
		if err != nil {
			t.Fatal(err)
		}
		f := strings.Fields(out)
		if i := slices.Index(f, "inet6"); i >= 0 && i+1 < len(f) && !strings.Contains(out, "tentative") {
			return hostPort(netip.MustParsePrefix(f[i+1]).Addr().WithZone(via).String(), "80")
		}
	}
	t.Fatalf("%s has no link-local address", ifName)
	return ""
}
