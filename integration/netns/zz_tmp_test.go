package netns_test

import ("testing";"strings")

func TestZZ(t *testing.T) {
	forBoth(t, meshPolicy, nil, func(t *testing.T, p *pod, family string) {
		if family == "4" { return }
		out, _ := execIn(p.world, "", "ip", "-6", "-o", "address", "show", "dev", "world0", "scope", "link")
		ll := strings.Split(strings.Fields(out)[3], "/")[0]
		t.Log(ll)
		got := p.agent(appOwner).do(request{Op: "dial", Net: "tcp6", Remotes: []string{"["+ll+"%eth0]:80"}, Say: "describe", TimeoutMS: 2000}).Outcomes[0]
		t.Logf("link-local app: %+v", got)
		got = p.agent(proxyOwner).do(request{Op: "dial", Net: "tcp6", Remotes: []string{"["+ll+"%eth0]:80"}, Say: "describe", TimeoutMS: 2000}).Outcomes[0]
		t.Logf("link-local proxy: %+v", got)
		out, _ = execIn(p.path, "", "ip", "-6", "-o", "address", "show", "dev", "eth0", "scope", "link")
		ll = strings.Split(strings.Fields(out)[3], "/")[0]
		got = p.outside().do(request{Op: "dial", Net: "tcp6", Remotes: []string{"["+ll+"%world0]:80"}, Say: "describe", TimeoutMS: 2000}).Outcomes[0]
		t.Logf("link-local in: %+v", got)
		got = p.agent(appOwner).do(request{Op: "dial", Net: "tcp6", Remotes: []string{"["+ll+"%eth0]:80"}, Say: "describe", TimeoutMS: 2000}).Outcomes[0]
		t.Logf("link-local own: %+v", got)
	})
}
