package netns_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// L1: whatever happens to the plugin while it works, the namespace is as it was
// before or as the new policy says, whole.

// transitions are a policy in place and the one that the ADD under test applies.
var transitions = []struct{ name, before, after string }{
	{"from nothing", policyNone, policyKuma},
	{"to another policy", policyKuma, policyTProxy},
	{"to nothing", policyTProxy, policyNone},
}

// outcomes are the two states that a transition may end in.
type outcomes struct{ before, after string }

func outcomesOf(t *testing.T, before, after string, opts ...option) outcomes {
	t.Helper()
	return outcomes{freshly(t, before, opts...), freshly(t, after, opts...)}
}

// judge returns what is wrong with a state. The routes of a policy may be there
// ahead of its rules or stay behind them: without rules nothing takes them.
func (o outcomes) judge(exact string) error {
	switch rulesOf(shape(exact)) {
	case rulesOf(o.before), rulesOf(o.after):
		return nil
	}
	return fmt.Errorf("neither what was before nor the whole new policy:\n%s", lineDiff(o.before, shape(exact)))
}

// judgeTables is judge for iptables, where the kernel replaces one table of one
// family at a time: each is the one before or the new one.
func (o outcomes) judgeTables(exact string) error {
	have, before, after := tablesOf(shape(exact)), tablesOf(o.before), tablesOf(o.after)
	for name := range before {
		if _, ok := have[name]; !ok {
			have[name] = ""
		}
	}
	for name, table := range have {
		if table != before[name] && table != after[name] {
			return fmt.Errorf("%s is neither as before nor as in the new policy:\n%s", name, lineDiff(after[name], table))
		}
	}
	return nil
}

// tablesOf are the tables of a shape by the line that names them.
func tablesOf(shape string) map[string]string {
	tables := map[string]string{}
	name := ""
	for line := range strings.Lines(rulesOf(shape)) {
		if strings.HasPrefix(line, "table ") || strings.HasPrefix(line, "## ") {
			name = strings.TrimSpace(line)
		}
		tables[name] += line
	}
	return tables
}

// The system calls by which the plugin changes something or learns that it did.
var (
	sends    = []uint64{unix.SYS_SENDTO, unix.SYS_SENDMSG}
	receives = []uint64{unix.SYS_RECVFROM, unix.SYS_RECVMSG}
	prepares = []uint64{unix.SYS_SOCKET, unix.SYS_BIND, unix.SYS_SETNS, unix.SYS_SETSOCKOPT, unix.SYS_OPENAT}
	writes   = []uint64{unix.SYS_WRITE}
)

// faults are what is done to each of these calls.
var faults = []struct {
	name  string
	calls []uint64
	errno syscall.Errno
}{
	{"killed while sending", sends, 0},
	{"killed while receiving", receives, 0},
	{"killed while preparing", prepares, 0},
	{"killed while writing", writes, 0},
	{"no memory to send", sends, unix.ENOBUFS},
	{"not allowed to send", sends, unix.EPERM},
	{"no memory to receive", receives, unix.ENOBUFS},
	{"no memory to prepare", prepares, unix.ENOMEM},
	{"stdout is full", writes, unix.ENOSPC},
}

// TestFaultAtEverySystemCall does each fault to each call that an ADD makes, one
// ADD after the other until the calls run out.
func TestFaultAtEverySystemCall(t *testing.T) {
	for _, tr := range transitions {
		t.Run(tr.name, func(t *testing.T) {
			want := outcomesOf(t, tr.before, tr.after)
			jobs := make(chan int)
			var done sync.WaitGroup
			for range 2 {
				p, dir := bare(t), t.TempDir()
				done.Go(func() {
					for i := range jobs {
						f := fault{calls: faults[i].calls, errno: faults[i].errno}
						for f.nth = 1; ; f.nth++ {
							reached, err := p.fault(dir, tr.before, tr.after, f, want)
							if err != nil {
								t.Errorf("%s, number %d: %v", faults[i].name, f.nth, err)
							}
							if !reached {
								break
							}
						}
						t.Logf("%s: %d times", faults[i].name, f.nth-1)
						if f.nth == 1 {
							t.Errorf("%s: the ADD makes no such call", faults[i].name)
						}
					}
				})
			}
			for i := range faults {
				jobs <- i
			}
			close(jobs)
			done.Wait()
		})
	}
}

// fault applies before, then after with the fault, and judges the outcome. It
// is for other goroutines than the test's.
func (p *pod) fault(dir, before, after string, f fault, want outcomes) (reached bool, err error) {
	nft := withConf("backend", "nft")
	if r, err := p.launch("ADD", before, nft).run(); err != nil || r.err() != nil {
		return false, fmt.Errorf("ADD of the policy before: %v, %v", err, r.err())
	}
	r, calls, err := p.launch("ADD", after, nft).runTraced(dir, f)
	if err != nil {
		return false, err
	}
	reached = calls >= f.nth
	state, err := exactly(p.path)
	if err != nil {
		return reached, err
	}
	if err := want.judge(state); err != nil {
		return reached, err
	}
	isBefore, isAfter := rulesOf(shape(state)) == rulesOf(want.before), rulesOf(shape(state)) == rulesOf(want.after)
	switch {
	case r.exit == 0 && !isAfter:
		return reached, errors.New("ADD says that it succeeded, but left what was before")
	case !reached && r.exit != 0:
		return reached, fmt.Errorf("failed without a fault: %w", r.err())
	case r.exit == -1 && f.errno != 0:
		return reached, fmt.Errorf("crashed: %s", r.stderr)
	case r.exit > 0 && r.cniErr == nil && !slices.Equal(f.calls, writes):
		return reached, fmt.Errorf("failed without a CNI error\nstdout: %s\nstderr: %s", r.stdout, r.stderr)
	case r.exit > 0 && isBefore && shape(state) != want.before && !slices.Equal(f.calls, receives):
		// Unlike one that is killed it can tidy up behind itself, unless it was the
		// kernel's answer that was lost.
		return reached, fmt.Errorf("failed, and left\n%s", lineDiff(want.before, shape(state)))
	}
	// The next try, which a runtime makes, must get through.
	if r, err := p.launch("ADD", after, nft).run(); err != nil || r.err() != nil {
		return reached, fmt.Errorf("the next ADD: %v, %v", err, r.err())
	}
	state, err = exactly(p.path)
	if err == nil && shape(state) != want.after {
		err = fmt.Errorf("after the next ADD:\n%s", lineDiff(want.after, shape(state)))
	}
	return reached, err
}

// TestIPTablesProgramFails has the program of one family fail, once, before or
// after it has done its work: the other family's is to be taken back.
func TestIPTablesProgramFails(t *testing.T) {
	iptables := withConf("backend", "iptables")
	want := outcomesOf(t, policyNGINX, policyTProxy, iptables)
	for when, script := range map[string]string{
		"before its work":  `if mkdir "$0.failed" 2>/dev/null; then echo "cannot" >&2; exit 4; fi; exec "$REAL" "$@"`,
		"after its work":   `"$REAL" "$@" || exit; if mkdir "$0.failed" 2>/dev/null; then echo "cannot" >&2; exit 4; fi`,
		"killed before it": `if mkdir "$0.failed" 2>/dev/null; then kill -9 $$; fi; exec "$REAL" "$@"`,
		"killed after it":  `"$REAL" "$@" || exit; if mkdir "$0.failed" 2>/dev/null; then kill -9 $$; fi`,
	} {
		for _, family := range []string{"iptables", "ip6tables"} {
			t.Run(family+" "+when, func(t *testing.T) {
				dir := t.TempDir()
				for _, flavour := range []string{"", "-nft"} {
					name := family + flavour + "-restore"
					real, err := exec.LookPath(name)
					if err != nil {
						t.Fatal(err)
					}
					text := "#!/bin/sh\nREAL=" + real + "\n" + script + "\n"
					if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
						t.Fatal(err)
					}
				}
				p := bare(t)
				p.mustAdd(policyNGINX, iptables)
				r := p.add(policyTProxy, iptables, withEnv("PATH", dir+":"+os.Getenv("PATH")))
				if failed, err := filepath.Glob(dir + "/*.failed"); err != nil || len(failed) == 0 {
					t.Fatalf("the program that fails was not run: %v", r.err())
				}
				if r.cniErr == nil || !strings.Contains(r.cniErr.Error(), family) {
					t.Errorf("want a CNI error that names %s, got %v", family, r.err())
				}
				same(t, "after the failure", rulesOf(shape(p.exact())), rulesOf(want.before))
				p.mustAdd(policyTProxy, iptables)
				same(t, "the next ADD", shape(p.exact()), want.after)
			})
		}
	}
}

// TestKilledThenAnotherPolicy kills the first ADD of a namespace at whatever it
// sends the kernel: also when routes are made and rules are not yet. The next
// ADD, of a policy that needs no routes, must not leave them.
func TestKilledThenAnotherPolicy(t *testing.T) {
	p, dir := bare(t), t.TempDir()
	nft := withConf("backend", "nft")
	for name, next := range map[string]string{"nginx": policyNGINX, "none": policyNone} {
		want := freshly(t, next, nft)
		for _, killed := range []string{policyTProxy, policyKuma} {
			kills := 0
			for {
				r, _, err := p.launch("ADD", killed, nft).runTraced(dir, fault{calls: sends, nth: kills + 1})
				if err != nil {
					t.Fatal(err)
				}
				if r.exit == 0 {
					break
				}
				kills++
				p.mustAdd(next, nft)
				same(t, fmt.Sprintf("%s, killed while sending number %d, then %s", killed, kills, name), shape(p.exact()), want)
				if err := p.check(next, nft).err(); err != nil {
					t.Errorf("CHECK: %v", err)
				}
				p.mustAdd(policyNone, nft)
			}
			p.mustAdd(policyNone, nft)
			if kills < 3 {
				t.Errorf("%d kills are too few to say anything", kills)
			}
		}
	}
}

// TestKilledAtRandom kills each flavour's ADD, and the programs it starts, at
// moments that strace does not choose.
func TestKilledAtRandom(t *testing.T) {
	for _, f := range flavours() {
		t.Run(f.name, func(t *testing.T) {
			p := bare(t)
			want := outcomesOf(t, policyNGINX, policyKuma, using(f))
			judge := want.judge
			if f.backend == "iptables" {
				judge = want.judgeTables
			}
			start := time.Now()
			p.mustAdd(policyNGINX, using(f))
			p.mustAdd(policyKuma, using(f))
			span := time.Since(start) / 2
			for range 20 {
				p.mustAdd(policyNGINX, using(f))
				l := p.launch("ADD", policyKuma, using(f))
				l.killIn = 1 + rand.N(span)
				l.must(t)
				// A program it started may still be at work: it is part of the ADD.
				p.settled()
				if err := judge(p.exact()); err != nil {
					t.Fatalf("killed after %v: %v", l.killIn, err)
				}
			}
			p.mustAdd(policyKuma, using(f))
			same(t, "after the kills, ADD", shape(p.exact()), want.after)
		})
	}
}

// settled waits until no process but the test's is in the namespace.
func (p *pod) settled() {
	p.t.Helper()
	eventually(p.t, "the programs that a killed ADD left behind end", func() bool {
		out, err := exec.Command("ip", "netns", "pids", p.name).Output()
		return err == nil && len(strings.TrimSpace(string(out))) == 0
	})
}

// eventually waits for a condition; it never being true ends the test.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after 20 seconds not yet: %s", what)
		}
	}
}

// TestKernelRefuses has the kernel itself refuse the batch: the table of our
// name belongs to another, living process (nft's "flags owner").
func TestKernelRefuses(t *testing.T) {
	p := bare(t)
	var owner *exec.Cmd
	var stdin io.WriteCloser
	err := in(p.path, func() error {
		owner = exec.Command("nft", "--interactive")
		var err error
		if stdin, err = owner.StdinPipe(); err != nil {
			return err
		}
		return owner.Start()
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		stdin.Close()
		owner.Wait()
	}()
	fmt.Fprintln(stdin, "add table inet preroute { flags owner; }")
	eventually(t, "the table of another owner is there", func() bool { return strings.Contains(p.exact(), "table inet preroute") })
	before := p.exact()
	r := p.add(policyNGINX, withConf("backend", "nft"))
	if r.cniErr == nil || !strings.Contains(r.cniErr.Error(), "preroute") {
		t.Errorf("want a CNI error that names the table, got %v", r.err())
	}
	same(t, "a refused ADD changed something", p.exact(), before)
}

// TestWithoutRights runs the plugin in a user namespace of its own, where it
// has no rights over the pod's network namespace.
func TestWithoutRights(t *testing.T) {
	p := bare(t)
	before := p.exact()
	r := p.launch("ADD", policyNGINX).under("unshare", "--user", "--map-root-user").must(t)
	oneDocument(t, r.stdout)
	if r.cniErr == nil || !strings.Contains(r.cniErr.Error(), "network namespace") || !strings.Contains(r.cniErr.Error(), unix.EPERM.Error()) {
		t.Errorf("want a CNI error that names the namespace and says %q, got %v", unix.EPERM, r.err())
	}
	same(t, "an ADD without rights changed something", p.exact(), before)

	// L6: a pod without a policy does not notice.
	r = p.launch("ADD", "").under("unshare", "--user", "--map-root-user").must(t)
	if err := r.err(); err != nil {
		t.Errorf("a pod without a policy: %v", err)
	}
}
