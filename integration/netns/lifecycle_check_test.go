package netns_test

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// L4: CHECK tells what differs first; DEL never fails; GC and STATUS answer.

// rule is the command that deletes or replaces the first rule of a chain of our
// nft table whose text contains some words.
func (p *pod) ruleHandle(chain, words string) string {
	p.t.Helper()
	out := p.exec("nft", "--handle", "list", "chain", "inet", "preroute", chain)
	for line := range strings.Lines(out) {
		_, handle, isRule := strings.Cut(strings.TrimSpace(line), " # handle ")
		if isRule && strings.Contains(line, words) && !strings.HasPrefix(strings.TrimSpace(line), "chain ") {
			return handle
		}
	}
	p.t.Fatalf("chain %s has no rule with %q:\n%s", chain, words, out)
	return ""
}

func TestCheckNamesTheDifference(t *testing.T) {
	nft := flavours()[0]
	for _, tt := range []struct {
		name   string
		policy string
		tamper func(p *pod)
		want   string // a regular expression that the error matches
	}{
		{"a rule deleted", policyNGINX, func(p *pod) {
			p.exec("nft", "delete", "rule", "inet", "preroute", "output", "handle", p.ruleHandle("output", "2102"))
		}, `chain output`},
		{"the last rule deleted", policyNGINX, func(p *pod) {
			p.exec("nft", "delete", "rule", "inet", "preroute", "inbound", "handle", p.ruleHandle("inbound", "redirect to"))
		}, `chain inbound`},
		{"a rule replaced", policyNGINX, func(p *pod) {
			p.exec("nft", "replace", "rule", "inet", "preroute", "output", "handle", p.ruleHandle("output", "redirect to"), "meta", "l4proto", "tcp", "counter", "redirect", "to", ":8909")
		}, `chain output, rule \d+: want: .*8900.*; have: `},
		{"a rule added at the end", policyNGINX, func(p *pod) {
			p.exec("nft", "add", "rule", "inet", "preroute", "output", "tcp", "dport", "1", "drop")
		}, `chain output`},
		{"a rule put first", policyNGINX, func(p *pod) {
			p.exec("nft", "insert", "rule", "inet", "preroute", "prerouting", "accept")
		}, `chain prerouting`},
		{"a chain flushed", policyNGINX, func(p *pod) {
			p.exec("nft", "flush", "chain", "inet", "preroute", "prerouting")
		}, `chain prerouting`},
		{"a chain added", policyNGINX, func(p *pod) {
			p.exec("nft", "add", "chain", "inet", "preroute", "more", "{ type filter hook output priority 5; policy drop; }")
		}, `more`},
		{"a base chain's policy changed", policyNGINX, func(p *pod) {
			p.exec("nft", "add", "chain", "inet", "preroute", "output", "{ policy drop; }")
		}, `chain output`},
		{"an element of a set deleted", policyNGINX, func(p *pod) {
			p.exec("nft", "delete", "element", "inet", "preroute", p.setWith("8887"), "{ 8887 }")
		}, `8887`},
		{"an element added to a set", policyNGINX, func(p *pod) {
			p.exec("nft", "add", "element", "inet", "preroute", p.setWith("8887"), "{ 9999 }")
		}, `9999`},
		{"a set flushed", policyKuma, func(p *pod) {
			p.exec("nft", "flush", "set", "inet", "preroute", p.setWith("fd00::/8"))
		}, `set .*(fd00::|2001:db8:9::)`},
		{"the table deleted", policyNGINX, func(p *pod) {
			p.exec("nft", "delete", "table", "inet", "preroute")
		}, `table inet preroute`},
		{"the table dormant", policyNGINX, func(p *pod) {
			p.exec("nft", "add", "table", "inet", "preroute", "{ flags dormant; }")
		}, `dormant|flags`},
		{"everything of nft flushed", policyTProxy, func(p *pod) {
			p.exec("nft", "flush", "ruleset")
		}, `preroute`},
		{"the IPv4 policy rule deleted", policyTProxy, func(p *pod) {
			p.exec("ip", "-4", "rule", "delete", "lookup", "28786")
		}, `rule`},
		{"the IPv6 policy rule deleted", policyTProxy, func(p *pod) {
			p.exec("ip", "-6", "rule", "delete", "lookup", "28786")
		}, `rule`},
		{"the IPv6 route deleted", policyTProxy, func(p *pod) {
			p.exec("ip", "-6", "route", "flush", "table", "28786")
		}, `route`},
		{"the policy of another pod", policyKuma, func(p *pod) {
			p.mustAdd(policyNGINX, using(nft))
		}, `preroute`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := bare(t)
			p.mustAdd(tt.policy, using(nft))
			whole := shape(p.exact())
			if err := p.check(tt.policy, using(nft)).err(); err != nil {
				t.Fatalf("CHECK right after ADD: %v", err)
			}
			tt.tamper(p)
			tampered := p.exact()
			if shape(tampered) == whole {
				t.Fatal("the tampering changed nothing")
			}
			r := p.check(tt.policy, using(nft))
			oneDocument(t, r.stdout)
			if r.cniErr == nil || !regexp.MustCompile(tt.want).MatchString(r.cniErr.Error()) {
				t.Errorf("CHECK: want an error that matches %q, got %v", tt.want, r.err())
			} else {
				t.Log(r.cniErr)
			}
			same(t, "CHECK mended or changed something", p.exact(), tampered)

			p.mustAdd(tt.policy, using(nft))
			same(t, "ADD after the tampering", shape(p.exact()), whole)
		})
	}
}

// setWith is the name of the set of our nft table that holds an element.
func (p *pod) setWith(element string) string {
	p.t.Helper()
	out := p.exec("nft", "list", "sets", "inet")
	set := ""
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) > 1 && f[0] == "set" {
			set = f[1]
		}
		if strings.Contains(line, element) {
			return set
		}
	}
	p.t.Fatalf("no set holds %s:\n%s", element, out)
	return ""
}

// TestCheckIPTables tampers with one family, which one look at the other misses.
func TestCheckIPTables(t *testing.T) {
	for _, f := range flavours()[1:] {
		programs := map[string]string{"4": "iptables-nft", "6": "ip6tables-nft"}
		if f.name == "iptables-legacy" {
			programs = map[string]string{"4": "iptables-legacy", "6": "ip6tables-legacy"}
		}
		for family, program := range programs {
			for name, args := range map[string][]string{
				"a rule deleted":  {"-D", "PREROUTE_OUTPUT", "1"},
				"a rule added":    {"-A", "PREROUTE_INBOUND", "-p", "tcp", "--dport", "1", "-j", "RETURN"},
				"a chain flushed": {"-F", "PREROUTE_PREROUTING"},
				"the jump gone":   {"-F", "OUTPUT"},
			} {
				t.Run(f.name+" IPv"+family+" "+name, func(t *testing.T) {
					p := bare(t)
					p.mustAdd(policyNGINX, using(f))
					whole := shape(p.exact())
					if err := p.check(policyNGINX, using(f)).err(); err != nil {
						t.Fatalf("CHECK right after ADD: %v", err)
					}
					p.exec(program, append([]string{"-w", "-t", "nat"}, args...)...)
					if r := p.check(policyNGINX, using(f)); r.cniErr == nil || !strings.Contains(r.cniErr.Error(), "PREROUTE_") {
						t.Errorf("CHECK: want an error that names the chain, got %v", r.err())
					} else {
						t.Log(r.cniErr)
					}
					p.mustAdd(policyNGINX, using(f))
					same(t, "ADD after the tampering", withoutNotes(shape(p.exact())), withoutNotes(whole))
				})
			}
		}
	}
}

// TestCheckWithoutADD finds nothing of ours where something should be.
func TestCheckWithoutADD(t *testing.T) {
	p := bare(t)
	before := p.exact()
	if r := p.check(policyNGINX); r.cniErr == nil || !strings.Contains(r.cniErr.Error(), "preroute") {
		t.Errorf("CHECK without ADD: want an error that names what is missing, got %v", r.err())
	}
	if err := p.check("").err(); err != nil {
		t.Errorf("CHECK of a pod without a policy: %v", err)
	}
	same(t, "CHECK changed something", p.exact(), before)
}

func TestDelNeverFails(t *testing.T) {
	succeeds := func(t *testing.T, r result) {
		t.Helper()
		if err := r.err(); err != nil {
			t.Errorf("DEL: %v", err)
		}
		if r.stdout != "" {
			t.Errorf("DEL prints on stdout: %s", r.stdout)
		}
	}
	p := bare(t)
	t.Run("without ADD", func(t *testing.T) { succeeds(t, p.del(policyNGINX)) })
	t.Run("twice", func(t *testing.T) {
		p.mustAdd(policyNGINX)
		succeeds(t, p.del(policyNGINX))
		succeeds(t, p.del(policyNGINX))
	})
	t.Run("then CHECK and ADD answer", func(t *testing.T) {
		p.mustAdd(policyNGINX)
		succeeds(t, p.del(policyNGINX))
		p.check(policyNGINX) // whether DEL takes the rules out is its own affair
		p.mustAdd(policyNGINX)
		same(t, "ADD after DEL", shape(p.exact()), freshly(t, policyNGINX))
	})
	bad := map[string][]option{
		"no namespace given":      {withEnv("CNI_NETNS", "")},
		"namespace gone":          {withEnv("CNI_NETNS", p.path+"-gone")},
		"namespace of a dead pid": {withEnv("CNI_NETNS", "/proc/4194305/ns/net")},
		"no prevResult":           {withConf("prevResult", map[string]any{})},
		"no annotations":          {withConf("runtimeConfig", nil)},
		"node socket dead":        {withConf("nodeSocket", "/nonexistent/node.sock")},
		"another path":            {withAnnotation("preroute.io/path", "init")},
		"backend without programs": {
			withConf("backend", "iptables"), withEnv("PATH", lab.bare),
		},
	}
	for name, opts := range bad {
		t.Run(name, func(t *testing.T) { succeeds(t, p.del(policyNGINX, opts...)) })
	}
	for _, policy := range []string{"", "{", `{"v":2}`, `{"v":1,"udp":{"outboundPort":1}}`, `{"v":1,"outbound":{"exceptPorts":"*"}}`} {
		t.Run("policy "+policy, func(t *testing.T) { succeeds(t, p.del(policy)) })
	}
	t.Run("the namespace's file is left, its namespace not", func(t *testing.T) {
		file := t.TempDir() + "/netns"
		if err := os.WriteFile(file, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		succeeds(t, p.del(policyNGINX, withEnv("CNI_NETNS", file)))
	})
}

func TestGCAndSTATUS(t *testing.T) {
	p := bare(t)
	p.mustAdd(policyNGINX)
	before := p.exact()
	version := withConf("cniVersion", "1.1.0")
	for name, attachments := range map[string]any{
		"none":    []any{},
		"this":    []any{map[string]any{"containerID": p.name, "ifname": "eth0"}},
		"another": []any{map[string]any{"containerID": "other", "ifname": "eth0"}},
		"missing": nil,
	} {
		for _, command := range []string{"GC", "STATUS"} {
			stdin, env := p.call("", version, withConf("cni.dev/valid-attachments", attachments))
			r := runPlugin(t, command, stdin, map[string]string{"CNI_PATH": env["CNI_PATH"]})
			if err := r.err(); err != nil || r.stdout != "" {
				t.Errorf("%s with attachments %s: %v, stdout %q", command, name, err, r.stdout)
			}
		}
	}
	// The rules live and die with the namespace: nothing is to be collected.
	same(t, "GC or STATUS changed something", p.exact(), before)
}
