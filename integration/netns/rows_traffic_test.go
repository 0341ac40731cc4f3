package netns_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/preroute/preroute/plugin/redirect"
)

// forBoth runs a test in a pod of its own for each flavour, both families in turn.
func forBoth(t *testing.T, policy string, opts []podOption, f func(t *testing.T, p *pod, family string)) {
	for _, fl := range flavours() {
		t.Run(fl.name, func(t *testing.T) {
			t.Parallel()
			parsed, err := redirect.Parse(policy)
			if err != nil {
				t.Fatal(err)
			}
			p := newPod(t, opts...)
			p.mustAdd(policy, using(fl))
			(&scenario{}).startServers(p, parsed)
			for _, family := range []string{"4", "6"} {
				f(t, p, family)
			}
			if t.Failed() {
				t.Log(p.dump())
			}
		})
	}
}

func at(family, name, port string) string {
	return hostPort(addresses(family)[name].String(), port)
}

func sameHost(a, b string) bool {
	x, errX := netip.ParseAddrPort(a)
	y, errY := netip.ParseAddrPort(b)
	return errX == nil && errY == nil && x.Addr() == y.Addr()
}

// A proxy that passes on what it gets: the connection that it opens is its own,
// so the far end must be reached, from both directions, in both modes.
func TestThroughTheProxy(t *testing.T) {
	for _, mode := range []string{"redirect", "tproxy"} {
		t.Run(mode, func(t *testing.T) {
			policy := `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"mode":"` + mode + `"},"outbound":{"port":8900}}`
			forBoth(t, policy, nil, func(t *testing.T, p *pod, family string) {
				via := func(a *agent, name, want string) {
					t.Helper()
					got := a.do(request{Op: "dial", Net: "tcp" + family, Remotes: []string{at(family, name, "80")}, Say: "via describe"}).Outcomes[0]
					if got.Err != "" || got.View.Who != want || got.View.Local != at(family, name, "80") {
						t.Errorf("IPv%s to %s through the proxy: got %+v", family, name, got)
					}
				}
				via(p.agent(appOwner), "far", "world")
				via(p.agent(rootOwner), "gw", "world")
				via(p.outside(), "pod", "app")
				for name, a := range map[string]*agent{"far": p.agent(appOwner), "pod": p.outside()} {
					r := request{Op: "echo", Net: "tcp" + family, Remotes: []string{at(family, name, "80")}, Say: "via echo", Count: 4, Bytes: 1 << 20}
					for _, got := range a.do(r).Outcomes {
						if got.Err != "" {
							t.Errorf("IPv%s, 1 MiB to %s and back: %s", family, name, got.Err)
						}
					}
				}
			})
		})
	}
}

// 200 connections at once, each with some data, straight to the proxy and
// through it.
func TestManyConnections(t *testing.T) {
	for _, mode := range []string{"redirect", "tproxy"} {
		t.Run(mode, func(t *testing.T) {
			policy := `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"mode":"` + mode + `"},"outbound":{"port":8900}}`
			forBoth(t, policy, nil, func(t *testing.T, p *pod, family string) {
				for name, a := range map[string]*agent{"far": p.agent(appOwner), "pod": p.outside()} {
					for _, say := range []string{"echo", "via echo"} {
						r := request{Op: "echo", Net: "tcp" + family, Remotes: []string{at(family, name, "80"), at(family, name, "8080")}, Say: say, Count: 200, Bytes: 4 << 10}
						for _, got := range a.do(r).Outcomes {
							if got.Err != "" {
								t.Errorf("IPv%s, %q to %s: %s", family, say, name, got.Err)
								break
							}
						}
					}
				}
			})
		})
	}
}

// I3: a connection to the inbound port itself is taken by the proxy once; there
// is no way for it to go round.
func TestInboundPortIsTakenOnce(t *testing.T) {
	for _, mode := range []string{"redirect", "tproxy"} {
		for _, hairpin := range []string{"false", "true"} {
			t.Run(mode+", hairpin "+hairpin, func(t *testing.T) {
				policy := `{"v":1,"proxy":{"uids":[2102],"hairpin":` + hairpin + `},"inbound":{"port":8901,"mode":"` + mode + `"},"outbound":{"port":8900}}`
				forBoth(t, policy, nil, func(t *testing.T, p *pod, family string) {
					proxy := p.agent(proxyOwner)
					before := proxy.do(request{Op: "accepted", Who: "proxy-in"}).Count
					got := p.outside().do(request{Op: "dial", Net: "tcp" + family, Remotes: []string{at(family, "pod", "8901")}, Say: "describe"}).Outcomes[0]
					after := proxy.do(request{Op: "accepted", Who: "proxy-in"}).Count
					if got.View.Who != "proxy-in" || after != before+1 {
						t.Errorf("IPv%s: the proxy took %d connections, the client got %+v", family, after-before, got)
					}
				})
			})
		}
	}
}

// I4: the proxy dials the app from the client's address, and the app's answers,
// which are addressed to a client outside, come back to it.
func TestTProxyFromTheClientsAddress(t *testing.T) {
	for name, policy := range map[string]string{
		"hairpin false":     `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"mode":"tproxy"},"outbound":{"port":8900}}`,
		"hairpin true":      `{"v":1,"proxy":{"uids":[2102],"hairpin":true},"inbound":{"port":8901,"mode":"tproxy"},"outbound":{"port":8900}}`,
		"no owner is named": `{"v":1,"inbound":{"port":8901,"mode":"tproxy"}}`,
	} {
		t.Run(name, func(t *testing.T) {
			for _, twice := range []bool{false, true} {
				name := map[bool]string{false: "once", true: "twice"}[twice]
				t.Run(name, func(t *testing.T) {
					forBoth(t, policy, []podOption{withSecond}, func(t *testing.T, p *pod, family string) {
						proxy := p.agent(proxyOwner)
						proxy.do(request{Op: "close", Who: "proxy-in"})
						for _, v := range []string{"4", "6"} {
							proxy.do(request{Op: "listen", Who: "proxy-in", Net: "tcp" + v, Addr: ":8901", Transparent: true, Onward: "client"})
						}
						for _, c := range []struct{ src, dst string }{{"far", "pod"}, {"far2", "pod"}, {"gw", "pod"}, {"via2", "second"}} {
							r := request{Net: "tcp" + family, Local: at(family, c.src, "0"), Remotes: []string{at(family, c.dst, "80")}}
							r.Op, r.Say = "dial", "via describe"
							got := p.outside().do(r).Outcomes[0]
							if got.Err != "" || got.View.Who != "app" || !sameHost(got.View.Peer, got.Local) || got.View.Local != r.Remotes[0] {
								t.Errorf("IPv%s, %s to %s: got %+v", family, c.src, c.dst, got)
							}
							r.Op, r.Say, r.Count, r.Bytes = "echo", "via echo", 20, 1<<18
							for _, got := range p.outside().do(r).Outcomes {
								if got.Err != "" {
									t.Errorf("IPv%s, %s to %s: data: %s", family, c.src, c.dst, got.Err)
									break
								}
							}
						}
					})
				})
			}
		})
	}
}

// Hairpin as Istio uses it: a call of the proxy to its own pod comes in by the
// inbound port, from where it is passed on to the app from 127.0.0.6 or ::6.
func TestHairpinThroughTheProxy(t *testing.T) {
	for _, mode := range []string{"redirect", "tproxy"} {
		t.Run(mode, func(t *testing.T) {
			policy := `{"v":1,"proxy":{"uids":[2102],"hairpin":true},"inbound":{"port":8901,"mode":"` + mode + `"},"outbound":{"port":8900}}`
			forBoth(t, policy, nil, func(t *testing.T, p *pod, family string) {
				proxy := p.agent(proxyOwner)
				proxy.do(request{Op: "close", Who: "proxy-in"})
				for v, from := range map[string]string{"4": "127.0.0.6", "6": "::6"} {
					proxy.do(request{Op: "listen", Who: "proxy-in", Net: "tcp" + v, Addr: ":8901", Transparent: mode == "tproxy", Onward: from})
				}
				for who, a := range map[string]*agent{"the proxy": proxy, "outside": p.outside()} {
					before := proxy.do(request{Op: "accepted", Who: "proxy-in"}).Count
					got := a.do(request{Op: "dial", Net: "tcp" + family, Remotes: []string{at(family, "pod", "80")}, Say: "via describe"}).Outcomes[0]
					taken := proxy.do(request{Op: "accepted", Who: "proxy-in"}).Count - before
					if got.Err != "" || got.View.Who != "app" || taken != 1 || !sameHost(got.View.Peer, at(family, "passthrough", "0")) {
						t.Errorf("IPv%s, from %s: the inbound port took %d connections; got %+v", family, who, taken, got)
					}
				}
			})
		})
	}
}

const dnsPolicy = `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901},"outbound":{"port":8900},"dns":{"port":15053}}`

// D1: whatever socket the app asks with, the answer comes from the server asked.
func TestDNSSockets(t *testing.T) {
	for _, bind := range []struct {
		name  string
		addrs []string
		info  bool
	}{
		{"wildcard", []string{":15053"}, false},
		{"wildcard with packet info", []string{":15053"}, true},
		{"loopback", []string{"127.0.0.1:15053", "[::1]:15053"}, false},
	} {
		t.Run(bind.name, func(t *testing.T) {
			forBoth(t, dnsPolicy, []podOption{withSecond}, func(t *testing.T, p *pod, family string) {
				proxy := p.agent(proxyOwner)
				proxy.do(request{Op: "close", Who: "dns-proxy"})
				proxy.serve(request{Op: "dns", Who: "dns-proxy", Net: "udp", PacketInfo: bind.info}, bind.addrs...)
				proxy.serve(request{Op: "dns", Who: "dns-proxy", Net: "tcp"}, bind.addrs...)
				defer proxy.do(request{Op: "close", Who: "dns-proxy"})
				var remotes []string
				for _, name := range []string{"far", "far2", "gw", "via2"} {
					remotes = append(remotes, at(family, name, "53"))
				}
				for _, who := range []owner{appOwner, rootOwner} {
					for _, r := range []request{
						{Net: "udp"},
						{Net: "udp", Unconnected: true},
						{Net: "udp", Unconnected: true, Local: at(family, "pod", "0")},
						{Net: "udp", Local: at(family, "pod", "0")},
						{Net: "udp", Local: at(family, "second", "0")},
						{Net: "tcp"},
					} {
						r.Op, r.Remotes, r.TimeoutMS = "query", remotes, 5000
						r.Net += family
						for i, got := range p.agent(who).do(r).Outcomes {
							orig := ""
							if strings.HasPrefix(r.Net, "tcp") {
								orig = remotes[i]
							}
							if got.Err != "" || got.View.Who != "dns-proxy" || got.From != remotes[i] || got.View.Orig != orig {
								t.Fatalf("UID %d asks %s, request %+v: got %+v", who.uid, remotes[i], r, got)
							}
						}
					}
				}
			})
		})
	}
}

// D2: a thousand queries of the app and a thousand of the proxy at once, over
// three source ports.
func TestDNSOverThreePorts(t *testing.T) {
	forBoth(t, dnsPolicy, nil, func(t *testing.T, p *pod, family string) {
		proxy, app := p.agent(proxyOwner), p.agent(appOwner)
		p.sysctl("net/ipv4/ip_local_port_range", "40000 40002")
		both := func(what string, fromApp, fromProxy request, wantApp string) {
			t.Helper()
			waits := map[string]func() (answer, error){"app": app.start(fromApp), "proxy": proxy.start(fromProxy)}
			for who, want := range map[string]string{"app": wantApp, "proxy": "world"} {
				ans, err := waits[who]()
				if err != nil {
					t.Fatal(err)
				}
				wrong := map[string]int{}
				for _, got := range ans.Outcomes {
					if got.Err != "" || got.View.Who != want {
						wrong[got.View.Who+" "+got.Err]++
					}
				}
				if len(wrong) > 0 {
					t.Fatalf("IPv%s, %s, the %s: of %d queries, these did not get to %s: %v", family, what, who, len(ans.Outcomes), want, wrong)
				}
			}
		}

		// One server, and sockets that come and go: a port is used again as soon as
		// a query is done, for a captured query and an untouched one in turn.
		one := request{Op: "query", Net: "udp" + family, Remotes: []string{at(family, "far", "53")}, Count: 1000, Workers: 2}
		both("one server", one, one, "dns-proxy")

		// A thousand sockets of each open at the same time, told apart by the
		// server; then the same addresses and ports with the owners exchanged.
		both("many servers", manyServers(family, 0), manyServers(family, 1000), "dns-proxy")
		both("many servers, exchanged", manyServers(family, 1000), manyServers(family, 0), "dns-proxy")

		// The whole way: the proxy asks a server of its own for each question.
		proxy.do(request{Op: "close", Who: "dns-proxy"})
		proxy.do(request{Op: "dns", Who: "dns-proxy", Net: "udp" + family, Addr: ":15053", Onward: at(family, "far", "53")})
		both("through the proxy", manyServers(family, 0), manyServers(family, 1000), "dns-proxy via world")
		proxy.do(request{Op: "close", Who: "dns-proxy"})
		proxy.serve(request{Op: "dns", Who: "dns-proxy", Net: "udp"}, ":15053")
	})
}

// manyServers asks each of a thousand servers of the world once, all at once,
// from sockets that may share a port.
func manyServers(family string, from int) request {
	r := request{Op: "query", Net: "udp" + family, Reuse: true}
	for i := range 1000 {
		hi, lo := byte((from+i)>>8), byte(from+i)
		host := netip.AddrFrom4([4]byte{172, 20, hi, lo})
		if family == "6" {
			host = netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0, 3, 14: hi, 15: lo})
		}
		r.Remotes = append(r.Remotes, netip.AddrPortFrom(host, 53).String())
	}
	return r
}
