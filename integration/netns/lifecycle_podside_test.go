package netns_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// What runs in a pod or by hand: preroute init, verify, check, explain, version.

// command is preroute with arguments, inside the pod's network namespace.
func (p *pod) command(policy string, args ...string) launch {
	env := map[string]string{"PATH": os.Getenv("PATH")}
	if policy != "" {
		env["PREROUTE_POLICY"] = policy
	}
	return launch{argv: append([]string{lab.plugin}, args...), env: env, netns: p.path}
}

// restricted runs a launch as the injected container's security context does:
// root without capabilities but those given, no new privileges, a read-only root.
func (l launch) restricted(caps string) launch {
	return l.under("unshare", "--mount", "sh", "-ec", `mount -o remount,bind,ro / ; exec "$0" "$@"`,
		"setpriv", "--bounding-set=-all"+caps, "--inh-caps=-all", "--no-new-privs")
}

// unprivileged runs it as the verify container: nobody, without any capability.
func (l launch) unprivileged(uid string) launch {
	return l.under("setpriv", "--reuid="+uid, "--regid="+uid, "--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs")
}

func TestInit(t *testing.T) {
	for _, pol := range lifePolicies[1:] {
		t.Run(pol.name, func(t *testing.T) {
			p := bare(t)
			init := p.command(pol.text, "init").restricted(",+net_admin")
			delete(init.env, "PATH")
			init.argv[0] = "/usr/bin/unshare"
			init.env["PATH"] = "/usr/bin:/bin" // for unshare and setpriv; no iptables there
			r := init.must(t)
			if r.exit != 0 {
				t.Fatalf("init: exit status %d: %s", r.exit, r.stderr)
			}
			whole := p.exact()
			same(t, "init", shape(whole), freshly(t, pol.text, withConf("backend", "nft")))

			r = init.must(t)
			if r.exit != 0 || !strings.Contains(r.stdout+r.stderr, "already") || strings.Count(strings.TrimSpace(r.stdout+r.stderr), "\n") != 0 {
				t.Errorf("init again: exit status %d, want 0 and one line that says so: %s%s", r.exit, r.stdout, r.stderr)
			}
			same(t, "init again changed something", p.exact(), whole)
		})
	}
	t.Run("after the CNI path", func(t *testing.T) {
		p := bare(t)
		p.mustAdd(policyNGINX)
		whole := p.exact()
		if r := p.command(policyNGINX, "init").must(t); r.exit != 0 || !strings.Contains(r.stdout+r.stderr, "already") {
			t.Errorf("exit status %d: %s%s", r.exit, r.stdout, r.stderr)
		}
		same(t, "init after ADD changed something", p.exact(), whole)
	})
	t.Run("another policy", func(t *testing.T) {
		p := bare(t)
		for _, pol := range []string{policyTProxy, policyKuma, policyNGINX} {
			if r := p.command(pol, "init").must(t); r.exit != 0 {
				t.Fatalf("exit status %d: %s", r.exit, r.stderr)
			}
		}
		same(t, "the last policy", shape(p.exact()), freshly(t, policyNGINX))
	})
	t.Run("by iptables", func(t *testing.T) {
		p := bare(t)
		init := p.command(policyNGINX, "init", "--backend", "iptables")
		for range 2 {
			if r := init.must(t); r.exit != 0 {
				t.Fatalf("exit status %d: %s", r.exit, r.stderr)
			}
		}
		same(t, "the rules", shape(p.exact()), freshly(t, policyNGINX, withConf("backend", "iptables")))
	})
}

func TestInitFails(t *testing.T) {
	p := bare(t)
	before := p.exact()
	for name, tt := range map[string]struct {
		l    launch
		want string
	}{
		"no policy":             {p.command("", "init"), "PREROUTE_POLICY"},
		"a bad policy":          {p.command(`{"v":1,"dns":{"port":"53"}}`, "init"), `PREROUTE_POLICY: dns.port: "53"`},
		"UDP":                   {p.command(`{"v":1,"udp":{"outboundPort":8908}}`, "init"), "udp"},
		"an unknown backend":    {p.command(policyNGINX, "init", "--backend", "ipchains"), "ipchains"},
		"an unknown flag":       {p.command(policyNGINX, "init", "--force"), "force"},
		"an argument":           {p.command(policyNGINX, "init", "now"), "now"},
		"without CAP_NET_ADMIN": {p.command(policyNGINX, "init").restricted(",+net_raw"), "CAP_NET_ADMIN"},
		"as nobody":             {p.command(policyNGINX, "init").unprivileged("65534"), "CAP_NET_ADMIN"},
	} {
		r := tt.l.must(t)
		if r.exit == 0 || r.exit == -1 || !strings.Contains(r.stderr, tt.want) {
			t.Errorf("%s: exit status %d, want another than 0 and %q: %s", name, r.exit, tt.want, r.stderr)
		}
	}
	same(t, "a failed init changed something", p.exact(), before)

	// In the namespace of the machine itself; the policy would redirect nothing.
	if _, err := os.Stat("/proc/sys/net/core/netdev_max_backlog"); err == nil {
		l := p.command(policyNone, "init")
		l.netns = ""
		if r := l.must(t); r.exit != 1 || !strings.Contains(r.stderr, "host") {
			t.Errorf("on the host: exit status %d, want 1 and why: %s", r.exit, r.stderr)
		}
	}
}

// verify is the verify container of a pod.
func (p *pod) verify(policy, wait string) launch {
	return p.command(policy, "verify", "--wait", wait).unprivileged("65534")
}

func TestVerifyPasses(t *testing.T) {
	const only = `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"ports":"80"},"outbound":{"port":8900,"ports":"443","nets":["10.9.0.0/16","fd00:9::/32"]}}`
	for _, f := range flavours() {
		for name, policy := range map[string]string{"nginx": policyNGINX, "kuma": policyKuma, "tproxy": policyTProxy, "includes": only} {
			t.Run(f.name+" "+name, func(t *testing.T) {
				t.Parallel() // with tproxy what is redirected is waited for
				p := newPod(t)
				p.mustAdd(policy, using(f))
				for range 2 { // a container that is restarted
					r := p.verify(policy, "0s").must(t)
					if r.exit != 0 {
						t.Fatalf("exit status %d: %s", r.exit, r.stderr)
					}
					for _, want := range []string{"outbound IPv4", "outbound IPv6", "inbound IPv4", "inbound IPv6"} {
						if !strings.Contains(r.stdout, want) || strings.Contains(r.stdout, "nothing to prove") {
							t.Errorf("%s was not proven: %s", want, r.stdout)
						}
					}
				}
			})
		}
	}
	// By an excepted interface nothing is redirected, and nothing need be; what
	// leaves by another one (eth1 leads to 203.0.113.0/24) is proven all the same.
	for ifName, unproven := range map[string]string{`eth0","eth1`: "outbound", "lo": "inbound", "eth0": "", "eth1": ""} {
		t.Run("except "+ifName, func(t *testing.T) {
			p := newPod(t, withSecond)
			policy := strings.TrimSuffix(policyNGINX, "}") + `,"exceptInterfaces":["` + ifName + `"]}`
			p.mustAdd(policy)
			r := p.verify(policy, "0s").must(t)
			if r.exit != 0 {
				t.Fatalf("exit status %d: %s", r.exit, r.stderr)
			}
			for _, direction := range []string{"outbound", "inbound"} {
				proven := regexp.MustCompile(direction + ` IPv[46]: a connection`).MatchString(r.stdout)
				if proven != (direction != unproven) {
					t.Errorf("%s was proven: %v: %s", direction, proven, r.stdout)
				}
			}
		})
	}
	t.Run("without IPv6", func(t *testing.T) {
		p := newPod(t, withoutIPv6)
		p.mustAdd(policyNGINX)
		if r := p.verify(policyNGINX, "0s").must(t); r.exit != 0 {
			t.Errorf("exit status %d: %s", r.exit, r.stderr)
		}
	})
	t.Run("a policy that redirects nothing", func(t *testing.T) {
		if r := newPod(t).verify(policyNone, "0s").must(t); r.exit != 0 {
			t.Errorf("exit status %d: %s", r.exit, r.stderr)
		}
	})
}

// TestVerifyFails takes one direction of one family away, and more.
func TestVerifyFails(t *testing.T) {
	nft := func(args ...string) func(p *pod) {
		return func(p *pod) {
			p.exec("nft", append(args[:2:2], append([]string{"inet", "preroute"}, args[2:]...)...)...)
		}
	}
	iptables := func(program string, args ...string) func(p *pod) {
		return func(p *pod) { p.exec(program, append([]string{"-w", "-t", "nat"}, args...)...) }
	}
	all := []string{"outbound IPv4", "outbound IPv6", "inbound IPv4", "inbound IPv6"}
	for _, tt := range []struct {
		name, policy, backend string
		tamper                func(p *pod)
		wrong                 []string
	}{
		{"no rules at all", policyNGINX, "", nil, all},
		{"no rules at all, tproxy", policyTProxy, "", nil, all},
		{"the table deleted", policyNGINX, "nft", nft("delete", "table"), all},
		{"outbound IPv4", policyNGINX, "nft", nft("insert", "rule", "output", "meta", "nfproto", "ipv4", "tcp", "sport", "!=", "8901", "accept"), all[0:1]},
		{"outbound IPv6", policyNGINX, "nft", nft("insert", "rule", "output", "meta", "nfproto", "ipv6", "tcp", "sport", "!=", "8901", "accept"), all[1:2]},
		{"inbound IPv4", policyNGINX, "nft", nft("insert", "rule", "inbound", "meta", "nfproto", "ipv4", "accept"), all[2:3]},
		{"inbound IPv6", policyNGINX, "nft", nft("insert", "rule", "inbound", "meta", "nfproto", "ipv6", "accept"), all[3:4]},
		{"inbound, both", policyNGINX, "nft", nft("flush", "chain", "inbound"), all[2:4]},
		{"outbound, both", policyNGINX, "nft", nft("flush", "chain", "output"), all}, // the way to inbound is there too
		{"DNS by UDP", policyKuma, "nft", nft("insert", "rule", "output", "udp", "dport", "53", "accept"), []string{"DNS over UDP, IPv4", "DNS over UDP, IPv6"}},
		{"inbound IPv6, tproxy", policyTProxy, "nft", func(p *pod) {
			p.exec("nft", "insert", "rule", "inet", "preroute", "inbound", "meta", "nfproto", "ipv6", "accept")
		}, all[3:4]},
		{"IPv4 flushed", policyNGINX, "iptables", iptables("iptables-nft", "-F", "OUTPUT"), []string{all[0], all[2]}},
		{"IPv6 flushed", policyNGINX, "iptables", iptables("ip6tables-nft", "-F", "OUTPUT"), []string{all[1], all[3]}},
		{"IPv6 inbound flushed", policyNGINX, "iptables", iptables("ip6tables-nft", "-F", "PREROUTE_INBOUND"), all[3:4]},
	} {
		t.Run(tt.name+" "+tt.backend, func(t *testing.T) {
			t.Parallel() // what is not redirected is waited for
			p := newPod(t)
			if tt.tamper != nil {
				p.mustAdd(tt.policy, withConf("backend", tt.backend))
				tt.tamper(p)
			}
			r := p.verify(tt.policy, "0s").must(t)
			if r.exit != 95 {
				t.Fatalf("exit status %d, want 95\n%s%s", r.exit, r.stdout, r.stderr)
			}
			verdict, advice, _ := strings.Cut(r.stderr, "\n")
			for _, what := range append(all, "DNS over UDP, IPv4", "DNS over UDP, IPv6", "DNS over TCP, IPv4", "DNS over TCP, IPv6") {
				want := false
				for _, w := range tt.wrong {
					want = want || w == what
				}
				if strings.Contains(verdict, what+":") != want {
					t.Errorf("%s is said to be wrong: %v, want %v: %s", what, !want, want, verdict)
				}
			}
			if !strings.Contains(advice, "preroute-installer") {
				t.Errorf("the message does not say what to do: %s", r.stderr)
			}
		})
	}
}

func TestVerifyWaitsForRepair(t *testing.T) {
	p := newPod(t)
	type done struct {
		r   result
		err error
	}
	c := make(chan done, 1)
	go func() {
		r, err := p.verify(policyNGINX, "50s").run()
		c <- done{r, err}
	}()
	eventually(t, "verify listens in the place of the proxy", func() bool {
		return strings.Contains(p.exec("ss", "-Hltn"), ":8901")
	})
	select {
	case d := <-c:
		t.Fatalf("verify did not wait: %v, %v", d.r, d.err)
	case <-time.After(time.Second): // it has looked once, and found nothing
	}
	p.mustAdd(policyNGINX)
	if d := <-c; d.err != nil || d.r.exit != 0 {
		t.Errorf("after the repair: %v, exit status %d: %s", d.err, d.r.exit, d.r.stderr)
	}
}

func TestVerifyCannot(t *testing.T) {
	p := newPod(t)
	p.mustAdd(policyNGINX)
	// As the proxy, whose traffic goes straight out: a proof would be false.
	if r := p.command(policyNGINX, "verify", "--wait", "0s").unprivileged("2102").must(t); r.exit == 0 || r.exit == 95 || !strings.Contains(r.stderr, "2102") {
		t.Errorf("as the proxy: exit status %d: %s", r.exit, r.stderr)
	}
	// The proxy's port is taken.
	p.agent(proxyOwner).serve(request{Op: "listen", Who: "proxy", Net: "tcp"}, ":8900")
	if r := p.verify(policyNGINX, "0s").must(t); r.exit == 0 || !strings.Contains(r.stderr, "8900") {
		t.Errorf("with the port taken: exit status %d: %s", r.exit, r.stderr)
	}
	if r := p.verify("", "0s").must(t); r.exit == 0 || r.exit == 95 || !strings.Contains(r.stderr, "PREROUTE_POLICY") {
		t.Errorf("without a policy: exit status %d: %s", r.exit, r.stderr)
	}
}

func TestCheckCommand(t *testing.T) {
	p := bare(t)
	p.mustAdd(policyNGINX)
	file := filepath.Join(t.TempDir(), "policy.json")
	if err := os.WriteFile(file, []byte(policyNGINX+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	fromStdin := p.command("", "check", "--policy", "-")
	fromStdin.stdin = policyNGINX
	byPath := p.command("", "check", "--policy", file, "--netns", p.path)
	byPath.netns = ""
	looks := map[string]launch{
		"file":          p.command("", "check", "--policy", file),
		"stdin":         fromStdin,
		"environment":   p.command(policyNGINX, "check"),
		"by path":       byPath,
		"backend named": p.command(policyNGINX, "check", "--backend", "nft"),
	}
	for name, l := range looks {
		if r := l.must(t); r.exit != 0 {
			t.Errorf("%s: exit status %d: %s%s", name, r.exit, r.stdout, r.stderr)
		}
	}
	p.exec("nft", "flush", "chain", "inet", "preroute", "inbound")
	tampered := p.exact()
	for name, l := range looks {
		r := l.must(t)
		first, _, _ := strings.Cut(r.stdout, "\n")
		if r.exit != 1 || !strings.Contains(first, "chain inbound") {
			t.Errorf("%s, tampered: exit status %d, want 1 and the difference on the first line: %s%s", name, r.exit, r.stdout, r.stderr)
		}
	}
	same(t, "check changed something", p.exact(), tampered)
	for name, l := range map[string]launch{
		"no such file":      p.command("", "check", "--policy", file+"-gone"),
		"no policy":         p.command("", "check"),
		"a bad policy":      p.command("{", "check"),
		"no such namespace": p.command(policyNGINX, "check", "--netns", p.path+"-gone"),
	} {
		if r := l.must(t); r.exit != 2 || r.stderr == "" {
			t.Errorf("%s: exit status %d, want 2 and why: %s", name, r.exit, r.stderr)
		}
	}
}

func TestExplainCommand(t *testing.T) {
	p := bare(t)
	file := filepath.Join(t.TempDir(), "policy.json")
	if err := os.WriteFile(file, []byte(policyKuma), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args string
		want string
	}{
		{"--to 192.0.2.9:443 --uid 1000", `redirected to the proxy's port 15001 \(rule O1`},
		{"--to [2001:db8::9]:443 --uid 1000", `redirected to the proxy's port 15001 \(rule O1`},
		{"--to 192.0.2.9:443 --uid 5678", `left alone \(rule O2`},
		{"--to 192.0.2.9:443 --uid 1000 --gid 5678", `left alone \(rule O2`},
		{"--to 192.0.2.9:443 --uid 0", `left alone \(rule O6: an excepted UID`},
		{"--to 10.0.0.9:443 --uid 1000", `left alone \(rule O6: an excepted network`},
		{"--to 192.0.2.9:443 --uid 1000 --interface eth1", `left alone \(rule I5`},
		{"--to 192.0.2.53:53 --udp --uid 1000", `redirected to the proxy's port 15053 \(rule D1`},
		{"--to 127.0.0.1:53 --udp --uid 1000", `left alone \(rule O3`},
		{"--to 10.1.0.5:80 --from 198.51.100.9", `redirected to the proxy's port 15006 \(rule I1`},
		{"--to 10.1.0.5:80 --from 192.0.2.9:40000 --inbound", `left alone \(rule I2`},
		{"--to 10.1.0.5:80 --own 10.1.0.5,fd00:1::5 --uid 1000", `left alone \(rule O4`},
		{"--to 10.1.0.5:80 --from 10.1.0.5:40000 --own 10.1.0.5 --uid 5678", `redirected to the proxy's port 15006 \(rule I1`},
	} {
		args := append([]string{"explain", "--policy", file}, strings.Fields(tt.args)...)
		r := p.command("", args...).must(t)
		if r.exit != 0 || !regexp.MustCompile(tt.want).MatchString(r.stdout) || strings.Count(r.stdout, "\n") != 1 {
			t.Errorf("explain %s: exit status %d, want a sentence that matches %s\n%s%s", tt.args, r.exit, tt.want, r.stdout, r.stderr)
		}
	}
	for _, args := range []string{"", "--to 192.0.2.9", "--to x:1", "--to 192.0.2.9:443 --from x", "--to 192.0.2.9:443 --uid -1", "--to 192.0.2.9:443 --uid 4294967295", "--to 192.0.2.9:443 --own x", "--to 192.0.2.9:443 more"} {
		r := p.command("", append([]string{"explain", "--policy", file}, strings.Fields(args)...)...).must(t)
		if r.exit != 2 || r.stderr == "" {
			t.Errorf("explain %s: exit status %d, want 2 and why: %s", args, r.exit, r.stderr)
		}
	}
}

func TestOtherCommands(t *testing.T) {
	p := bare(t)
	if r := p.command("", "version").must(t); r.exit != 0 || !strings.HasPrefix(r.stdout, "preroute ") {
		t.Errorf("version: exit status %d: %s", r.exit, r.stdout)
	}
	if r := p.command("", "help").must(t); r.exit != 0 || !strings.Contains(r.stdout, "preroute verify") {
		t.Errorf("help: exit status %d: %s", r.exit, r.stdout)
	}
	for _, args := range [][]string{nil, {"explode"}} {
		if r := p.command("", args...).must(t); r.exit != 2 || r.stdout != "" || !strings.Contains(r.stderr, "preroute verify") {
			t.Errorf("%q: exit status %d, want 2 and the usage on stderr: %s%s", args, r.exit, r.stdout, r.stderr)
		}
	}
	for _, name := range []string{"init", "verify", "check", "explain"} {
		if r := p.command("", name, "-h").must(t); r.exit != 0 {
			t.Errorf("%s -h: exit status %d", name, r.exit)
		}
	}
}
