package netns_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What the life-cycle tests (lifecycle_*_test.go) need beside the lab: pods
// without a world, since most of them send no packet, one run of a program with
// everything about its surroundings given, and rooms: private mount namespaces.

// The policies that the life-cycle tests apply. Between them they use every kind
// of rule, set, route and address that the plugin makes.
const (
	policyNGINX  = `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"exceptPorts":"8887,8895-8896"},"outbound":{"port":8900,"exceptPorts":"53"}}`
	policyKuma   = `{"v":1,"proxy":{"uids":[5678],"gids":[5678],"hairpin":true},"inbound":{"port":15006,"exceptSources":["192.0.2.0/24"]},"outbound":{"port":15001,"exceptNets":["10.0.0.0/8","192.168.0.0/16","2001:db8:9::/48","fd00::/8"],"exceptUIDs":[0]},"dns":{"port":15053},"exceptInterfaces":["eth1"]}`
	policyTProxy = `{"v":1,"proxy":{"uids":[2102],"hairpin":true},"inbound":{"port":8901,"mode":"tproxy"},"outbound":{"port":8900,"ports":"80,443,9000-9100","nets":["10.0.0.0/8","2001:db8::/32"]}}`
	policyNone   = `{"v":1}`
)

// bare makes a pod that is a network namespace with nothing but lo in it. It has
// no world; what needs packets uses newPod.
func bare(t testing.TB) *pod {
	t.Helper()
	p := barePod(t)
	t.Cleanup(p.close)
	if err := makeNetns(p.name); err != nil {
		t.Fatalf("making the network namespace %s: %v", p.path, err)
	}
	return p
}

// barePod is the pod alone, its namespace still to be made.
func barePod(t testing.TB) *pod {
	p := &pod{
		t:       t,
		name:    fmt.Sprintf("%s%d-%d", netnsPrefix, os.Getpid(), podCount.Add(1)),
		ifName:  "eth0",
		mac:     "02:00:00:00:00:01",
		started: map[string]*agent{},
	}
	p.path = filepath.Join(netnsFolder, p.name)
	p.world = p.path + "-world"
	return p
}

// exact is everything in the namespace that the plugin may change, to the
// handle and the counter: two equal texts mean that nothing was touched.
func (p *pod) exact() string {
	p.t.Helper()
	text, err := exactly(p.path)
	if err != nil {
		p.t.Fatal(err)
	}
	return text
}

// exactly reads it anew while the kernel still works on an address of lo: that
// becomes usable, and its route appears, a moment after it was added.
func exactly(path string) (text string, err error) {
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		text, err = readExactly(path)
		address, route := strings.Contains(text, "inet6 ::6/128"), strings.Contains(text, "local ::6 dev lo")
		if err != nil || (address == route && !strings.Contains(text, " tentative")) {
			return text, err
		}
	}
	return text, errors.New("an address of lo is tentative for ever")
}

// xtablesTable is a table that iptables-nft made. nft prints its rules as well
// as it can, which differs from time to time.
var xtablesTable = regexp.MustCompile(`(?m)^table ip6? (nat|mangle|raw|filter) \{.*\n(.+\n|\n\t)*\}\n`)

// saveComment is a comment of iptables-save; it holds the time of day.
var saveComment = regexp.MustCompile(`(?m)^#.*\n`)

func readExactly(path string) (string, error) {
	var b strings.Builder
	err := in(path, func() error {
		output := func(stdin, name string, args ...string) (string, error) {
			cmd := exec.Command(name, args...)
			cmd.Stdin = strings.NewReader(stdin)
			var stderr strings.Builder
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			if err != nil {
				err = fmt.Errorf("%s: %w\n%s", cmd, err, stderr.String())
			}
			return string(out), err
		}
		ruleset, err := output("", "nft", "--handle", "list", "ruleset")
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "## nft\n%s", xtablesTable.ReplaceAllString(ruleset, ""))
		save := func(family, flavour, table string) error {
			out, err := output("", family+"tables-"+flavour+"-save", "--counters", "--table", table)
			fmt.Fprintf(&b, "## %stables-%s %s\n%s", family, flavour, table, saveComment.ReplaceAllString(out, ""))
			return err
		}
		for _, family := range []string{"ip", "ip6"} {
			for _, table := range []string{"filter", "mangle", "nat", "raw"} {
				// Looking makes no table, but takes as long as an ADD.
				if strings.Contains(ruleset, "table "+family+" "+table+" {") {
					if err := save(family, "nft", table); err != nil {
						return err
					}
				}
			}
			names, err := os.ReadFile("/proc/thread-self/net/" + family + "_tables_names")
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			for _, table := range slices.Sorted(strings.FieldsSeq(string(names))) {
				if err := save(family, "legacy", table); err != nil {
					return err
				}
			}
		}
		b.WriteString(routesBelow)
		for _, family := range []string{"-4", "-6"} {
			out, err := output("rule show\nroute show table all\naddress show dev lo\n", "ip", "-oneline", family, "-batch", "-")
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, "## ip %s\n%s", family, out)
		}
		return nil
	})
	return b.String(), err
}

// routesBelow parts the rules of an exact text from its routes and addresses.
const routesBelow = "## routes and addresses\n"

var handles = regexp.MustCompile(` # handle \d+`)

// shape is the exact text without what differs between two namespaces in which
// the same rules were made in different ways: handles, which count up with every
// rule ever made; the order of tables; and tables of iptables that hold nothing
// but their empty default chains, which that program never takes away.
func shape(exact string) string {
	rules, routes, _ := strings.Cut(handles.ReplaceAllString(exact, ""), routesBelow)
	var tables []string
	add := func(table string) {
		if table != "" && !strings.HasPrefix(table, "## nft") && !emptyTable.MatchString(table) {
			tables = append(tables, table)
		}
	}
	table := ""
	for line := range strings.Lines(rules) {
		if strings.HasPrefix(line, "table ") || strings.HasPrefix(line, "## ") {
			add(table)
			table = ""
		}
		table += line
	}
	add(table)
	slices.Sort(tables)
	return strings.Join(tables, "") + routesBelow + routes
}

var emptyTable = regexp.MustCompile(`^## ip6?tables-.*\n(\*.*\n(:[A-Z]+ ACCEPT .*\n)*COMMIT\n)?$`)

// rulesOf is the part of an exact text that decides about packets: without the
// routes and addresses, which do nothing unless a rule asks for them.
func rulesOf(exact string) string {
	rules, _, _ := strings.Cut(exact, routesBelow)
	return rules
}

// freshly is the shape of a namespace in which nothing but ADD of a policy ran.
func freshly(t testing.TB, policy string, opts ...option) string {
	t.Helper()
	p := bare(t)
	p.mustAdd(policy, opts...)
	return shape(p.exact())
}

// same fails the test, showing the lines that differ, unless got is want.
func same(t testing.TB, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s:\n%s", what, lineDiff(want, got))
	}
}

// lineDiff shows the lines of one text that are not in the other.
func lineDiff(want, got string) string {
	var b strings.Builder
	only := func(sign, from, in string) {
		count := map[string]int{}
		for line := range strings.Lines(in) {
			count[line]++
		}
		for line := range strings.Lines(from) {
			if count[line]--; count[line] < 0 {
				fmt.Fprintf(&b, "%s %s", sign, line)
			}
		}
	}
	only("-", want, got)
	only("+", got, want)
	return cmp.Or(b.String(), "the same lines in another order")
}

// A launch is one run of a program in given surroundings.
type launch struct {
	argv   []string // the built plugin when empty
	stdin  string
	env    map[string]string // all of it
	netns  string            // path; "" is this process's own
	room   *room             // nil is this process's own mounts
	attr   *syscall.SysProcAttr
	killIn time.Duration // after the start; 0 is never
}

// run is safe in any goroutine: what goes wrong with the run itself is in err.
func (l launch) run() (result, error) {
	var r result
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	argv := l.argv
	if len(argv) == 0 {
		argv = []string{lab.plugin}
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = []string{}
	for k, v := range l.env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	cmd.Stdin = strings.NewReader(l.stdin)
	cmd.SysProcAttr = l.attr
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := cmd.Start
	if l.room != nil {
		start = func() error { return l.room.do(cmd.Start) }
	}
	if l.netns != "" {
		if l.room != nil {
			return r, errors.New("a launch is either in a room or in a namespace")
		}
		start = func() error { return in(l.netns, cmd.Start) }
	}
	if err := start(); err != nil {
		return r, fmt.Errorf("starting %s: %w", argv[0], err)
	}
	if l.killIn > 0 {
		defer time.AfterFunc(l.killIn, func() { cmd.Process.Kill() }).Stop()
	}
	err := cmd.Wait()
	if ctx.Err() != nil {
		return r, fmt.Errorf("%q did not end within a minute\nstderr: %s", argv, stderr.String())
	}
	var status *exec.ExitError
	if err != nil && !errors.As(err, &status) {
		return r, fmt.Errorf("running %q: %w", argv, err)
	}
	r = result{stdout: stdout.String(), stderr: stderr.String(), exit: cmd.ProcessState.ExitCode()}
	if r.exit != 0 && l.env["CNI_COMMAND"] != "" {
		r.cniErr = parseCNIError(r.stdout)
	}
	return r, nil
}

// parseCNIError is nil where stdout is not one CNI error.
func parseCNIError(stdout string) *cniError {
	var e cniError
	if json.Unmarshal([]byte(stdout), &e) != nil {
		return nil
	}
	return &e
}

// must is run where a failure to run ends the test.
func (l launch) must(t testing.TB) result {
	t.Helper()
	r, err := l.run()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// launch is one CNI command for this pod, to be changed and run.
func (p *pod) launch(command, policy string, opts ...option) launch {
	p.t.Helper()
	stdin, env := p.call(policy, opts...)
	env["CNI_COMMAND"] = command
	if _, set := env["PATH"]; !set {
		env["PATH"] = os.Getenv("PATH")
	}
	return launch{stdin: stdin, env: env}
}

// under puts a program in front of the plugin: strace, setpriv, unshare.
func (l launch) under(argv ...string) launch {
	if len(l.argv) == 0 {
		l.argv = []string{lab.plugin}
	}
	l.argv = append(argv[:len(argv):len(argv)], l.argv...)
	return l
}

// A room is a thread with mounts of its own: what is mounted, bound or listened
// on there is seen by the programs started from it and by nobody else.
type room struct {
	t    testing.TB
	work chan func()
}

// newRoom makes a room with an empty /run, in which only /run/netns is kept as
// it is now: pods are made first.
func newRoom(t testing.TB) *room {
	t.Helper()
	r := &room{t: t, work: make(chan func())}
	go func() {
		runtime.LockOSThread() // never unlocked: the mounts go with the thread
		for f := range r.work {
			f()
		}
	}()
	t.Cleanup(func() { close(r.work) })
	err := r.do(func() error {
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			return err
		}
		old, err := unix.Open(netnsFolder, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(old)
		return errors.Join(
			unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount("tmpfs", "/run", "tmpfs", 0, ""),
			os.Mkdir(netnsFolder, 0o755),
			unix.Mount(fmt.Sprintf("/proc/thread-self/fd/%d", old), netnsFolder, "", unix.MS_BIND|unix.MS_REC, ""),
		)
	})
	if err != nil {
		t.Fatalf("making a private mount namespace: %v", err)
	}
	return r
}

func (r *room) do(f func() error) error {
	done := make(chan error, 1)
	r.work <- func() { done <- f() }
	return <-done
}

// must is do where a failure ends the test.
func (r *room) must(f func() error) {
	r.t.Helper()
	if err := r.do(f); err != nil {
		r.t.Fatal(err)
	}
}

// oneDocument decodes stdout, which must be one JSON document and nothing else.
func oneDocument(t testing.TB, stdout string) map[string]any {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(stdout))
	var doc map[string]any
	if err := d.Decode(&doc); err != nil {
		t.Fatalf("stdout is not JSON: %v\n%s", err, stdout)
	}
	rest, _ := io.ReadAll(io.MultiReader(d.Buffered(), strings.NewReader(stdout[d.InputOffset():])))
	if len(bytes.TrimSpace(rest)) > 0 {
		t.Errorf("something follows the JSON on stdout: %s", stdout)
	}
	return doc
}
