package netns_test

import "testing"

// The lab itself: without the plugin everything goes where it is sent. If this
// fails, no other failure says anything about Preroute.
func TestLabWithoutPlugin(t *testing.T) {
	p := newPod(t, withSecond)
	p.outside().serve(request{Op: "listen", Who: "world", Net: "tcp"}, ":80")
	p.outside().serve(request{Op: "dns", Who: "world", Net: "udp", PacketInfo: true}, ":53")
	p.agent(appOwner).serve(request{Op: "listen", Who: "app", Net: "tcp"}, ":80")
	p.agent(proxyOwner).serve(request{Op: "listen", Who: "proxy", Net: "tcp", Transparent: true}, ":8900")
	for _, f := range []struct{ family, world, second, pod, loop string }{
		{"4", "198.51.100.9", "203.0.113.9", podIPv4.Addr().String(), "127.0.0.1"},
		{"6", "2001:db8::9", "2001:db8:2::9", podIPv6.Addr().String(), "::1"},
	} {
		in, out := p.outside(), p.agent(appOwner)
		for _, c := range []struct {
			from *agent
			to   string
			port string
			want string
		}{
			{out, f.world, "80", "world"},
			{out, f.second, "80", "world"},
			{out, f.pod, "80", "app"},
			{out, f.loop, "80", "app"},
			{out, f.loop, "8900", "proxy"},
			{in, f.pod, "80", "app"},
			{in, f.pod, "8900", "proxy"},
		} {
			got := c.from.do(request{Op: "dial", Net: "tcp" + f.family, Remotes: []string{hostPort(c.to, c.port)}, Say: "describe"}).Outcomes[0]
			if got.View.Who != c.want || got.Err != "" {
				t.Errorf("to %s: got %+v, want %s", hostPort(c.to, c.port), got, c.want)
			}
		}
		for _, unconnected := range []bool{false, true} {
			r := request{Op: "query", Net: "udp" + f.family, Remotes: []string{hostPort(f.world, "53"), hostPort(f.second, "53")}, Unconnected: unconnected}
			for i, got := range out.do(r).Outcomes {
				if got.View.Who != "world" || got.From != r.Remotes[i] {
					t.Errorf("DNS to %s: got %+v", r.Remotes[i], got)
				}
			}
		}
	}
	if d := p.dump(); d == "" {
		t.Error("the dump is empty")
	} else {
		t.Logf("%s", d)
	}
}
