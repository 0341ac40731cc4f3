package netns_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/preroute/preroute/plugin/redirect"
	"golang.org/x/sys/unix"
)

// L5 and L6: a bad policy stops its pod with a sentence, and nobody else's pod.

// malformed makes n different policies that are wrong: a good one with one field
// replaced, doubled, renamed or cut.
func malformed(n int) []string {
	const good = `{"v":1,"proxy":{"uids":[2102],"gids":[7],"hairpin":false},` +
		`"inbound":{"port":8901,"mode":"redirect","ports":"80","exceptPorts":"8887,8895-8896","exceptSources":["10.0.0.0/8"]},` +
		`"outbound":{"port":8900,"ports":"443","exceptPorts":"53","nets":["10.0.0.0/8"],"exceptNets":["fd00::/8"],"exceptUIDs":[0]},` +
		`"udp":{"mode":"proxy-protocol","inboundPort":0,"outboundPort":0},"dns":{"port":15053},"exceptInterfaces":["eth1"]}`
	pieces := []string{
		`8901`, `8900`, `15053`, `2102`, `"redirect"`, `"80"`, `"443"`, `"8887,8895-8896"`, `"53"`, `["10.0.0.0/8"]`, `"fd00::/8"`, `[0]`, `false`,
		`"proxy-protocol"`, `"eth1"`, `"v":1`, `"port"`, `"uids"`, `"exceptPorts"`, `"outbound"`, `"dns"`, `{`, `}`, `[`, `]`, `:`, `,`, `"`,
	}
	with := []string{
		`-1`, `0.5`, `1e3`, `65536`, `4294967295`, `99999999999999999999`, `null`, `true`, `"yes"`, `"*"`, `"0"`, `"80,,443"`, `"90-80"`, `"080"`, `"1-65536"`,
		`" "`, `[]`, `{}`, `["*"]`, `["10.0.0.0/33"]`, `["10.0.0.1"]`, `["::ffff:10.0.0.0/104"]`, `[[]]`, `[null]`, `""`, `"eth*"`, `"v":2`, `"v":"1"`,
		`"Port"`, `"port":1,"port"`, `"x"`, `{{`, `}}`, ``, ` `, "\x00", "\xff", `\`, `"a":1,`, `"\u0000"`,
	}
	r := rand.New(rand.NewPCG(7, 7))
	seen := map[string]bool{}
	var out []string
	for len(out) < n {
		text := good
		for range 1 + r.IntN(2) {
			piece := pieces[r.IntN(len(pieces))]
			at := strings.Index(text, piece)
			if last := strings.LastIndex(text, piece); last > at && r.IntN(2) == 0 {
				at = last
			}
			if at < 0 {
				continue
			}
			text = text[:at] + with[r.IntN(len(with))] + text[at+len(piece):]
		}
		if r.IntN(10) == 0 {
			text = text[:r.IntN(len(text))]
		}
		if _, err := redirect.Parse(text); err == nil || seen[text] || text == "" {
			continue
		}
		seen[text] = true
		out = append(out, text)
	}
	return out
}

// TestMalformedPolicies runs an ADD for each of a thousand bad annotations.
func TestMalformedPolicies(t *testing.T) {
	jobs := make(chan string)
	var done sync.WaitGroup
	for range 3 {
		p := bare(t)
		before := p.exact()
		stdin, env := p.call("@policy@")
		quoted, _ := json.Marshal("@policy@")
		done.Go(func() {
			for policy := range jobs {
				if err := refused(stdin, string(quoted), env, policy); err != nil {
					t.Errorf("policy %s: %v", policy, err)
				}
			}
			if after, err := exactly(p.path); err != nil || after != before {
				t.Errorf("bad policies changed something: %v\n%s", err, lineDiff(before, after))
			}
		})
	}
	for _, policy := range malformed(1000) {
		jobs <- policy
	}
	close(jobs)
	done.Wait()
}

func refused(stdin, placeholder string, env map[string]string, policy string) error {
	annotation, err := json.Marshal(policy)
	if err != nil {
		return err
	}
	// As JSON carries it: what is no UTF-8 was replaced on the way.
	var arrives string
	if err := json.Unmarshal(annotation, &arrives); err != nil {
		return err
	}
	_, parseErr := redirect.Parse(arrives)
	if parseErr == nil {
		return nil // it was the bad UTF-8 alone that was wrong
	}
	env["CNI_COMMAND"] = "ADD"
	r, err := launch{stdin: strings.Replace(stdin, placeholder, string(annotation), 1), env: env}.run()
	if err != nil {
		return err
	}
	switch {
	case r.exit != 1 || r.cniErr == nil:
		return fmt.Errorf("exit status %d, stdout %q, stderr %q", r.exit, r.stdout, r.stderr)
	case r.cniErr.Code != 7:
		return fmt.Errorf("want CNI error 7, got %v", r.cniErr)
	}
	text := r.cniErr.Msg + " " + r.cniErr.Details
	for _, want := range []string{policyAnnotation, parseErr.Error()} {
		if !strings.Contains(text, want) {
			return fmt.Errorf("the error does not say %q: %s", want, text)
		}
	}
	return nil
}

// TestBadPolicyWithPolicyInPlace holds that a bad annotation leaves a good
// policy that is in place alone.
func TestBadPolicyWithPolicyInPlace(t *testing.T) {
	p := bare(t)
	p.mustAdd(policyKuma)
	before := p.exact()
	for policy, want := range map[string]string{
		`{"v":1,"outbound":{"port":8900,"exceptPorts":"*"}}`: `outbound.exceptPorts: "*"`,
		`{"v":1,"udp":{"outboundPort":8908}}`:                `udp`,
		` `:                                                  policyAnnotation,
	} {
		r := p.add(policy)
		if r.cniErr == nil || r.cniErr.Code != 7 || !strings.Contains(r.cniErr.Error(), want) {
			t.Errorf("policy %s: want CNI error 7 with %q, got %v", policy, want, r.err())
		}
		same(t, "a bad policy changed something", p.exact(), before)
	}
}

// TestAnnotationOfAWrongType gives the plugin annotations as no runtime should.
func TestAnnotationOfAWrongType(t *testing.T) {
	p := bare(t)
	before := p.exact()
	annotations := func(v any) option { return withConf("runtimeConfig", map[string]any{annotationsKey: v}) }
	// L6: our annotation is not among them, so the pod is not ours to stop.
	for name, o := range map[string]option{
		"no runtimeConfig":      withConf("runtimeConfig", nil),
		"runtimeConfig null":    withConf("runtimeConfig", json.RawMessage("null")),
		"annotations null":      annotations(nil),
		"annotations empty":     annotations(map[string]any{}),
		"others are numbers":    annotations(map[string]any{"example.com/a": 5, "example.com/b": nil, "example.com/c": []any{}}),
		"other capabilities":    withConf("runtimeConfig", map[string]any{"portMappings": []any{map[string]any{"hostPort": 80}}}),
		"args of another's":     withConf("args", map[string]any{"cni": map[string]any{"ips": []any{"10.0.0.1"}}}),
		"unknown keys":          withConf("zzz", map[string]any{"policy": 1}),
		"a list of annotations": annotations([]any{}),
		"a string":              annotations("x"),
		// What is wrong in our own entry stops the pods that it is for.
		"an unknown backend":         withConf("backend", "ipchains"),
		"a backend of a wrong type":  withConf("backend", 1),
		"a logLevel of a wrong type": withConf("logLevel", []int{}),
		"namespaces of a wrong type": withConf("excludeNamespaces", "kube-system"),
	} {
		if err := p.add("", o).err(); err != nil {
			t.Errorf("%s: a pod without a policy fails: %v", name, err)
		}
	}
	// L5: it is among them and cannot be read.
	for _, v := range []any{5, true, map[string]any{"v": 1}, []any{}} {
		r := p.add("", annotations(map[string]any{policyAnnotation: v}))
		if r.cniErr == nil || r.cniErr.Code != 7 || !strings.Contains(r.cniErr.Error(), policyAnnotation) {
			t.Errorf("the policy as %T: want CNI error 7 that names the annotation, got %v", v, r.err())
		}
	}
	same(t, "annotations of a wrong type changed something", p.exact(), before)
}

// TestPathAnnotation holds which values of preroute.io/path let the plugin act.
func TestPathAnnotation(t *testing.T) {
	redirected, untouched := freshly(t, policyNGINX), shape(bare(t).exact())
	for path, want := range map[string]string{"cni": redirected, "init": untouched, "none": untouched} {
		p := bare(t)
		p.mustAdd(policyNGINX, withAnnotation("preroute.io/path", path))
		same(t, "path "+path, shape(p.exact()), want)
	}
	p := bare(t)
	before := p.exact()
	r := p.add(policyNGINX, withAnnotation("preroute.io/path", "both"))
	if r.cniErr == nil || r.cniErr.Code != 7 || !strings.Contains(r.cniErr.Error(), "preroute.io/path") || !strings.Contains(r.cniErr.Error(), "both") {
		t.Errorf("path both: want CNI error 7 that names annotation and value, got %v", r.err())
	}
	same(t, "an unknown path changed something", p.exact(), before)
}

// TestPolicyOfTheConflist holds the order: path, annotation, configuration.
func TestPolicyOfTheConflist(t *testing.T) {
	inConf := withConf("policy", json.RawMessage(policyKuma))
	nginx, kuma, untouched := freshly(t, policyNGINX), freshly(t, policyKuma), shape(bare(t).exact())
	for _, tt := range []struct {
		name, annotation string
		opts             []option
		want             string
	}{
		{"the conflist's alone", "", nil, kuma},
		{"the conflist's without annotations", "", []option{withConf("runtimeConfig", nil)}, kuma},
		{"the annotation beats it", policyNGINX, nil, nginx},
		{"an annotation that redirects nothing beats it", policyNone, nil, untouched},
		{"path none beats both", policyNGINX, []option{withAnnotation("preroute.io/path", "none")}, untouched},
		{"path init beats it", "", []option{withAnnotation("preroute.io/path", "init")}, untouched},
	} {
		p := bare(t)
		p.mustAdd(tt.annotation, append(tt.opts, inConf)...)
		same(t, tt.name, shape(p.exact()), tt.want)
		if err := p.check(tt.annotation, append(tt.opts, inConf)...).err(); err != nil {
			t.Errorf("%s: CHECK: %v", tt.name, err)
		}
	}
	p := bare(t)
	before := p.exact()
	for _, bad := range []string{`{"v":1,"outbound":{"exceptPorts":"*"}}`, `"x"`, `[]`, `{"v":3}`} {
		r := p.add("", withConf("policy", json.RawMessage(bad)))
		if r.cniErr == nil || r.cniErr.Code != 7 || !strings.Contains(r.cniErr.Error(), "policy") {
			t.Errorf("policy %s in the conflist: want CNI error 7, got %v", bad, r.err())
		}
	}
	same(t, "bad policies in the conflist changed something", p.exact(), before)
}

// TestBrokenNode holds L6: whatever is broken on our side of the node, pods
// without a policy start, and pods with one are redirected.
func TestBrokenNode(t *testing.T) {
	p := bare(t)
	want := freshly(t, policyNGINX)
	for name, prepare := range map[string]func() error{
		"no /run/preroute":             func() error { return nil },
		"/run/preroute is a file":      func() error { return os.WriteFile("/run/preroute", nil, 0o644) },
		"report.sock is a directory":   func() error { return os.MkdirAll("/run/preroute/report.sock", 0o755) },
		"report.sock is a file":        func() error { return writeBelow("/run/preroute", "report.sock", "") },
		"report.sock is a loop":        func() error { return linkBelow("/run/preroute", "report.sock", "report.sock") },
		"report.sock is nobody's":      func() error { return deadSocket("/run/preroute", "report.sock") },
		"report.sock is of a stream":   func() error { return streamSocket("/run/preroute", "report.sock") },
		"/run has no space and is r/o": func() error { return unix.Mount("", "/run", "", unix.MS_REMOUNT|unix.MS_RDONLY, "") },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRoom(t)
			r.must(prepare)
			for what, policy := range map[string]string{"without a policy": "", "with one": policyNGINX} {
				l := p.launch("ADD", policy)
				l.room = r
				if err := l.must(t).err(); err != nil {
					t.Errorf("a pod %s: %v", what, err)
				}
			}
			same(t, "the pod with a policy", shape(p.exact()), want)
			p.mustAdd(policyNone)
		})
	}
}

func writeBelow(dir, name, text string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644)
}

func linkBelow(dir, name, to string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.Symlink(to, filepath.Join(dir, name))
}
