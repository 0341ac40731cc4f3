package netns_test

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// The protocol: what a runtime sees of the plugin on stdin, stdout and in the
// exit status, whatever the policy.

var specVersions = []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// atLeast compares the versions above, which sort as strings.
func atLeast(version, than string) bool { return version >= than }

func TestProtocolVersions(t *testing.T) {
	r := runPlugin(t, "VERSION", `{"cniVersion":"1.1.0"}`, nil)
	if err := r.err(); err != nil {
		t.Fatalf("VERSION: %v", err)
	}
	doc := oneDocument(t, r.stdout)
	for _, v := range specVersions {
		if !slices.Contains(doc["supportedVersions"].([]any), any(v)) {
			t.Errorf("VERSION does not list %s: %s", v, r.stdout)
		}
	}

	for _, v := range specVersions {
		t.Run(v, func(t *testing.T) {
			p := bare(t)
			version := withConf("cniVersion", v)
			p.mustAdd(policyNGINX, version)
			p.mustAdd(policyNGINX, version)
			type step struct {
				command string
				since   string
			}
			for _, s := range []step{{"CHECK", "0.4.0"}, {"STATUS", "1.1.0"}, {"GC", "1.1.0"}, {"DEL", "0.3.1"}} {
				r := p.run(s.command, policyNGINX, version, withConf("cni.dev/valid-attachments", []any{}))
				switch {
				case atLeast(v, s.since):
					if err := r.err(); err != nil {
						t.Errorf("%s: %v", s.command, err)
					}
					if r.stdout != "" {
						t.Errorf("%s prints on stdout: %s", s.command, r.stdout)
					}
				case r.cniErr == nil || r.cniErr.Code != 1:
					t.Errorf("%s, which %s does not have: want CNI error 1, got %v", s.command, v, r.err())
				}
			}
		})
	}

	p := bare(t)
	for _, v := range []any{"0.2.0", "9.9.9", nil, "one"} {
		r := p.add(policyNGINX, withConf("cniVersion", v))
		if r.cniErr == nil || (r.cniErr.Code != 1 && v != "one") {
			t.Errorf("ADD with cniVersion %v: want CNI error 1, got %v", v, r.err())
		}
	}
	same(t, "refused versions changed something", p.exact(), bare(t).exact())
}

// TestResultIsPrevResult holds that the plugin adds nothing to a result, takes
// nothing out, and bends no number, for pods with and without a policy.
func TestResultIsPrevResult(t *testing.T) {
	rich := `{"cniVersion":"%s",
		"interfaces":[{"name":"veth<&>\u2028","mac":"02:00:00:00:00:01","mtu":1500,"socketPath":"/run/x"},{"name":"eth0","sandbox":"/run/netns/x","pciID":"0000:00:1f.6"}],
		"ips":[{"version":"4","interface":1,"address":"10.1.0.5/16","gateway":"10.1.0.1"},{"version":"6","interface":1,"address":"fd00:1::5/64"}],
		"routes":[{"dst":"0.0.0.0/0","gw":"10.1.0.1","mtu":1400,"table":42,"scope":0}],
		"dns":{"nameservers":["10.96.0.10"],"search":["svc.cluster.local"],"options":["ndots:5"]},
		"vendor.example/big":9007199254740993, "vendor.example/small":1e-7, "vendor.example/null":null, "vendor.example/deep":{"a":[{"b":{}}]}}`
	for _, v := range specVersions {
		for name, prev := range map[string]string{
			"rich":       fmt.Sprintf(rich, v),
			"minimal":    fmt.Sprintf(`{"cniVersion":%q,"dns":{}}`, v),
			"no version": `{"dns":{}}`,
			"empty":      `{}`,
			"missing":    ``,
		} {
			for what, policy := range map[string]string{"with a policy": policyNGINX, "without one": ""} {
				t.Run(v+" "+name+" "+what, func(t *testing.T) {
					var raw any
					if prev != "" {
						raw = json.RawMessage(prev)
					}
					p := bare(t)
					stdin, env := p.call(policy, withConf("cniVersion", v), withConf("prevResult", raw))
					if prev == "" {
						stdin, env = p.call(policy, withConf("cniVersion", v), withConf("prevResult", json.RawMessage("null")))
						stdin = strings.Replace(stdin, `,"prevResult":null`, "", 1)
						if strings.Contains(stdin, "prevResult") {
							t.Fatalf("prevResult is still there: %s", stdin)
						}
					}
					r := runPlugin(t, "ADD", stdin, env)
					if err := r.err(); err != nil {
						t.Fatalf("ADD: %v", err)
					}
					oneDocument(t, r.stdout)
					want := number(t, prev)
					want["cniVersion"] = v
					if got := number(t, r.stdout); !reflect.DeepEqual(got, want) {
						t.Errorf("printed\n%v\nwant\n%v", got, want)
					}
				})
			}
		}
	}
}

// number decodes an object without losing digits; "" is an empty one.
func number(t *testing.T, text string) map[string]any {
	t.Helper()
	out := map[string]any{}
	if text == "" {
		return out
	}
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	if err := d.Decode(&out); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return out
}

// TestInterfaceName holds that the name of the pod's interface is free.
func TestInterfaceName(t *testing.T) {
	p := bare(t)
	p.mustAdd(policyNGINX, withEnv("CNI_IFNAME", "net1"))
	same(t, "ADD with CNI_IFNAME=net1", shape(p.exact()), freshly(t, policyNGINX))
}

// TestProtocolErrors holds that every failure is one JSON document on stdout,
// exit status 1, and leaves the namespace alone.
func TestProtocolErrors(t *testing.T) {
	p := bare(t)
	before := p.exact()
	good, _ := p.call(policyNGINX)
	for _, tt := range []struct {
		name, command, stdin string
		env                  []option
		codes                []uint
		want                 string // in the text of the error
	}{
		{name: "empty stdin", stdin: "", codes: []uint{6}},
		{name: "no JSON", stdin: "policy", codes: []uint{6}},
		{name: "cut JSON", stdin: good[:len(good)/2], codes: []uint{6}},
		{name: "a list", stdin: "[]", codes: []uint{6}},
		{name: "null", stdin: "null", codes: []uint{1, 6, 7}},
		{name: "no name", stdin: strings.Replace(good, `"name":"preroute-lab"`, `"name":""`, 1), codes: []uint{7}, want: "name"},
		{name: "backend", stdin: strings.Replace(good, `{`, `{"backend":"ipchains",`, 1), codes: []uint{7}, want: "ipchains"},
		{name: "backend of a wrong type", stdin: strings.Replace(good, `{`, `{"backend":1,`, 1), codes: []uint{6, 7}, want: "backend"},
		{name: "no container ID", stdin: good, env: []option{withEnv("CNI_CONTAINERID", "")}, codes: []uint{4}, want: "CNI_CONTAINERID"},
		{name: "no namespace", stdin: good, env: []option{withEnv("CNI_NETNS", "")}, codes: []uint{4}, want: "CNI_NETNS"},
		{name: "no interface", stdin: good, env: []option{withEnv("CNI_IFNAME", "")}, codes: []uint{4}, want: "CNI_IFNAME"},
		{name: "no CNI_PATH", stdin: good, env: []option{withEnv("CNI_PATH", "")}, codes: []uint{4}, want: "CNI_PATH"},
		{name: "bad container ID", stdin: good, env: []option{withEnv("CNI_CONTAINERID", "../x")}, codes: []uint{4}, want: "../x"},
		{name: "unknown command", command: "EXPLODE", stdin: good, codes: []uint{4}, want: "EXPLODE"},
		{name: "namespace gone", stdin: good, env: []option{withEnv("CNI_NETNS", p.path+"-gone")}, codes: []uint{8}, want: p.path + "-gone"},
		{name: "not a namespace", stdin: good, env: []option{withEnv("CNI_NETNS", "/proc/self/ns/uts")}, codes: []uint{8}, want: "/proc/self/ns/uts"},
		{name: "a plain file", stdin: good, env: []option{withEnv("CNI_NETNS", lab.plugin)}, codes: []uint{8}, want: lab.plugin},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, env := p.call(policyNGINX)
			c := &call{env: env}
			for _, o := range tt.env {
				o(c)
			}
			command := tt.command
			if command == "" {
				command = "ADD"
			}
			r := runPlugin(t, command, tt.stdin, c.env)
			oneDocument(t, r.stdout)
			if r.exit != 1 || r.cniErr == nil {
				t.Fatalf("exit status %d, stdout %s", r.exit, r.stdout)
			}
			text := r.cniErr.Msg + " " + r.cniErr.Details
			if !slices.Contains(tt.codes, r.cniErr.Code) || !strings.Contains(text, tt.want) {
				t.Errorf("want CNI error %v with %q, got %v", tt.codes, tt.want, r.cniErr)
			}
		})
	}
	same(t, "failed commands changed something", p.exact(), before)
}

// TestStdoutAndStderr holds that a log, however chatty, stays off stdout.
func TestStdoutAndStderr(t *testing.T) {
	p := bare(t)
	for _, level := range []string{"debug", "info", "warn", "error"} {
		r := p.add(policyNGINX, withConf("logLevel", level))
		if err := r.err(); err != nil {
			t.Fatalf("logLevel %s: %v", level, err)
		}
		oneDocument(t, r.stdout)
		if level == "error" && r.stderr != "" {
			t.Errorf("logLevel error, a good ADD, and on stderr: %s", r.stderr)
		}
	}
}
