package netns_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netns"
)

const (
	netnsFolder = "/run/netns"
	netnsPrefix = "preroute-lab-" // then the pid of the test and a number
)

// The addresses of every pod and its world; pods do not see each other, so they
// can be the same in all of them.
var (
	podIPv4 = netip.MustParsePrefix("10.77.0.2/24")
	podIPv6 = netip.MustParsePrefix("fd00:77::2/64")
	gwIPv4  = netip.MustParsePrefix("10.77.0.1/24")
	gwIPv6  = netip.MustParsePrefix("fd00:77::1/64")

	secondIPv4   = netip.MustParsePrefix("10.88.0.2/24")
	secondIPv6   = netip.MustParsePrefix("fd00:88::2/64")
	secondGwIPv4 = netip.MustParsePrefix("10.88.0.1/24")
	secondGwIPv6 = netip.MustParsePrefix("fd00:88::1/64")

	// worldNets are the world's own as a whole: every address in them answers.
	worldNets = []string{"198.51.100.0/24", "203.0.113.0/24", "172.20.0.0/16", "2001:db8::/32"}
)

// worldEnd is the other end of the first and of the second interface.
var worldEnd = map[bool]string{false: "world0", true: "world1"}

var podCount atomic.Int64

// A pod is a network namespace as a runtime hands it to the plugin, joined by a
// veth to a second one, its world. Both go away with the test.
type pod struct {
	t       testing.TB
	name    string // unique; the container ID too
	path    string // of the pod's namespace
	world   string // path of the world's namespace
	ifName  string // of the first interface: eth0
	second  string // of the second interface: eth1, or ""
	noIPv6  bool
	mac     string
	mu      sync.Mutex
	started map[string]*agent
}

type podOption func(*pod)

// named gives the first interface another name than eth0.
func named(ifName string) podOption { return func(p *pod) { p.ifName = ifName } }

// withSecond adds an interface eth1 with addresses of its own; 203.0.113.0/24
// and 2001:db8:2::/48 are reached through it.
func withSecond(p *pod) { p.second = "eth1" }

// withoutIPv6 makes a pod that has IPv6 switched off, as with the boot option or
// the sysctl; (*pod).enableIPv6 switches it on.
func withoutIPv6(p *pod) { p.noIPv6 = true }

func newPod(t testing.TB, opts ...podOption) *pod {
	t.Helper()
	if err := inputs(); err != nil {
		t.Fatal(err)
	}
	p := &pod{
		t:       t,
		name:    fmt.Sprintf("%s%d-%d", netnsPrefix, os.Getpid(), podCount.Add(1)),
		ifName:  "eth0",
		started: map[string]*agent{},
	}
	for _, o := range opts {
		o(p)
	}
	p.path = filepath.Join(netnsFolder, p.name)
	p.world = p.path + "-world"
	t.Cleanup(p.close)
	for _, path := range []string{p.path, p.world} {
		if err := makeNetns(filepath.Base(path)); err != nil {
			t.Fatalf("making the network namespace %s: %v", path, err)
		}
	}
	if err := p.wire(); err != nil {
		t.Fatalf("wiring the pod %s: %v", p.name, err)
	}
	return p
}

func (p *pod) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range p.started {
		a.stop()
	}
	p.started = nil
	for _, path := range []string{p.path, p.world} {
		// A test may have removed it to see what DEL does then.
		if err := netns.DeleteNamed(filepath.Base(path)); err != nil && !errors.Is(err, os.ErrNotExist) {
			p.t.Errorf("removing %s: %v", path, err)
		}
	}
}

// call makes the configuration and environment of one run for this pod: the
// policy as annotation ("" for none), prevResult as a main plugin leaves it.
func (p *pod) call(policy string, opts ...option) (stdin string, env map[string]string) {
	p.t.Helper()
	annotations := map[string]string{}
	if policy != "" {
		annotations[policyAnnotation] = policy
	}
	ips := []any{map[string]any{"interface": 0, "address": podIPv4.String(), "gateway": gwIPv4.Addr().String(), "version": "4"}}
	if !p.noIPv6 {
		ips = append(ips, map[string]any{"interface": 0, "address": podIPv6.String(), "gateway": gwIPv6.Addr().String(), "version": "6"})
	}
	c := &call{
		conf: map[string]any{
			"cniVersion":    "1.0.0",
			"name":          "preroute-lab",
			"type":          "preroute",
			"capabilities":  map[string]any{annotationsKey: true},
			"runtimeConfig": map[string]any{annotationsKey: annotations},
		},
		env: map[string]string{
			"CNI_CONTAINERID": p.name,
			"CNI_NETNS":       p.path,
			"CNI_IFNAME":      p.ifName,
			"CNI_PATH":        lab.dir,
			"CNI_ARGS":        "IgnoreUnknown=1;K8S_POD_NAMESPACE=lab;K8S_POD_NAME=" + p.name,
		},
	}
	for _, o := range opts {
		o(c)
	}
	if _, set := c.conf["prevResult"]; !set {
		// "version" is of the spec versions before 1.0.0 only.
		if v, _ := c.conf["cniVersion"].(string); !strings.HasPrefix(v, "0.") {
			for _, ip := range ips {
				delete(ip.(map[string]any), "version")
			}
		}
		c.conf["prevResult"] = map[string]any{
			"cniVersion": c.conf["cniVersion"],
			"interfaces": []any{map[string]any{"name": p.ifName, "mac": p.mac, "sandbox": p.path}},
			"ips":        ips,
			"routes":     []any{map[string]any{"dst": "0.0.0.0/0"}},
			"dns":        map[string]any{},
		}
	}
	b, err := json.Marshal(c.conf)
	if err != nil {
		p.t.Fatal(err)
	}
	return string(b), c.env
}

func (p *pod) run(command, policy string, opts ...option) result {
	p.t.Helper()
	stdin, env := p.call(policy, opts...)
	return runPlugin(p.t, command, stdin, env)
}

// add, check and del run the plugin for this pod.
func (p *pod) add(policy string, opts ...option) result {
	p.t.Helper()
	return p.run("ADD", policy, opts...)
}
func (p *pod) check(policy string, opts ...option) result {
	p.t.Helper()
	return p.run("CHECK", policy, opts...)
}
func (p *pod) del(policy string, opts ...option) result {
	p.t.Helper()
	return p.run("DEL", policy, opts...)
}

// mustAdd is add where a failure ends the test.
func (p *pod) mustAdd(policy string, opts ...option) {
	p.t.Helper()
	if err := p.add(policy, opts...).err(); err != nil {
		p.t.Fatalf("ADD: %v\npolicy: %s", err, policy)
	}
}

// tryExec runs a program inside the pod's namespace, with stdin "" or text.
func (p *pod) tryExec(stdin, name string, args ...string) (stdout string, err error) {
	return execIn(p.path, stdin, name, args...)
}

// exec is tryExec where a failure ends the test.
func (p *pod) exec(name string, args ...string) string {
	p.t.Helper()
	out, err := p.tryExec("", name, args...)
	if err != nil {
		p.t.Fatal(err)
	}
	return out
}

func execIn(path, stdin, name string, args ...string) (stdout string, err error) {
	err = in(path, func() error {
		cmd := exec.Command(name, args...)
		cmd.Stdin = strings.NewReader(stdin)
		var errOut strings.Builder
		cmd.Stderr = &errOut
		// Start forks from this thread, so the child is born in its namespace.
		b, err := cmd.Output()
		stdout = string(b)
		if err != nil {
			return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, errOut.String())
		}
		return nil
	})
	return stdout, err
}

// dump is all that the plugin may change in a namespace, as text without
// counters. Looking does not create legacy tables.
func (p *pod) dump() string {
	p.t.Helper()
	var b strings.Builder
	section := func(name string, args ...string) {
		fmt.Fprintf(&b, "## %s %s\n%s", name, strings.Join(args, " "), p.exec(name, args...))
	}
	section("nft", "--stateless", "list", "ruleset")
	for _, family := range []string{"", "6"} {
		// nft leaves out the targets of some rules that iptables made.
		fmt.Fprintf(&b, "## ip%stables-nft-save\n%s", family, withoutCounters(p.exec("ip"+family+"tables-nft-save")))
		for _, table := range p.legacyTables("ip" + family) {
			out := p.exec("ip"+family+"tables-legacy-save", "--table", table)
			fmt.Fprintf(&b, "## ip%stables-legacy-save --table %s\n%s", family, table, withoutCounters(out))
		}
	}
	for _, family := range []string{"-4", "-6"} {
		section("ip", family, "rule")
		section("ip", family, "route", "show", "table", "all")
	}
	section("ip", "address", "show", "dev", "lo")
	return b.String()
}

// legacyTables are the tables of the legacy flavour that exist; family is "ip"
// or "ip6".
func (p *pod) legacyTables(family string) []string {
	p.t.Helper()
	var tables []string
	err := in(p.path, func() error {
		b, err := os.ReadFile("/proc/thread-self/net/" + family + "_tables_names")
		if errors.Is(err, os.ErrNotExist) {
			return nil // the kernel module is not even loaded
		}
		tables = strings.Fields(string(b))
		return err
	})
	if err != nil {
		p.t.Fatal(err)
	}
	return tables
}

// withoutCounters takes the comments, which hold the time, and the counters of
// the chains out of what iptables-save prints.
func withoutCounters(save string) string {
	var b strings.Builder
	for line := range strings.Lines(save) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		if strings.HasPrefix(line, ":") {
			line, _, _ = strings.Cut(line, " [")
			line += "\n"
		}
		b.WriteString(line)
	}
	return b.String()
}
