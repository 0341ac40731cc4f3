package netfilter

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// helperEnv makes TestIPTablesHelper apply the policy it holds.
const helperEnv = "PREROUTE_TEST_IPTABLES_POLICY"

// TestIPTablesHelper is the body of other processes that tests start: it applies
// a policy to the namespace that is file 3.
func TestIPTablesHelper(t *testing.T) {
	text, ok := os.LookupEnv(helperEnv)
	if !ok {
		return // not such a process
	}
	if os.Getenv("PREROUTE_TEST_READONLY_RUN") != "" {
		for _, m := range []struct {
			source, target, fstype string
			flags                  uintptr
		}{
			{"none", "/", "", unix.MS_REC | unix.MS_PRIVATE},
			{"empty", "/run", "tmpfs", unix.MS_RDONLY},
		} {
			if err := unix.Mount(m.source, m.target, m.fstype, m.flags, ""); err != nil {
				t.Fatal(err)
			}
		}
	}
	fmt.Println("ready")
	b := &IPTables{path: os.Getenv("PREROUTE_TEST_PATH")}
	if _, err := b.Apply(3, parse(t, text)); err != nil {
		t.Fatal(err)
	}
}

func helper(t *testing.T, b *IPTables, ns int, policy string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^TestIPTablesHelper$")
	cmd.Env = append(os.Environ(), helperEnv+"="+policy, "PREROUTE_TEST_PATH="+b.path)
	dup, err := unix.FcntlInt(uintptr(ns), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(dup), "netns")
	t.Cleanup(func() { file.Close() })
	cmd.ExtraFiles = []*os.File{file}
	return cmd
}

// Under a read-only host no lock file can be made.
func TestIPTablesReadOnlyRun(t *testing.T) {
	eachFlavour(t, func(t *testing.T, b *IPTables, f flavour) {
		ns, _ := newNS(t)
		cmd := helper(t, b, ns, tproxyPolicy)
		cmd.Env = append(cmd.Env, "PREROUTE_TEST_READONLY_RUN=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if err := b.Check(ns, parse(t, tproxyPolicy)); err != nil {
			t.Error(err)
		}
	})
}

// A kill at any moment leaves each table as it was or as it should be, never
// doubled and never half, and the next Apply ends what was begun.
func TestIPTablesKilled(t *testing.T) {
	eachFlavour(t, func(t *testing.T, b *IPTables, f flavour) {
		ns, run := newNS(t)
		policies := []string{redirectPolicy, tproxyPolicy}
		apply(t, b, ns, parse(t, policies[0]))
		halves := 0
		for i := range 24 {
			old, text := parse(t, policies[i%2]), policies[(i+1)%2]
			cmd := helper(t, b, ns, text)
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if _, err := stdout.Read(make([]byte, 6)); err != nil { // "ready"
				t.Fatal(err)
			}
			time.Sleep(time.Duration(i) * time.Millisecond) // any moment is a moment to be killed in
			_ = cmd.Process.Kill()
			_ = cmd.Wait()

			p := parse(t, text)
			var s state
			err = inNamespace(ns, unix.LOCK_SH, func(*os.File) (err error) { // waits for what still runs
				s, err = b.look()
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			if s.difference(f, old) != nil && s.difference(f, p) != nil {
				halves++
			}
			for at, have := range s.rules {
				for name := range have {
					was, is := wanted(old, f, at).get(name), wanted(p, f, at).get(name)
					if was.difference(have.get(name), "") != nil && is.difference(have.get(name), "") != nil {
						t.Errorf("killed after %d ms: table %s of %v is neither old nor new", i, name, at)
					}
				}
			}
			if _, err := b.Apply(ns, p); err != nil {
				t.Fatalf("Apply after a kill: %v", err)
			}
			if err := b.Check(ns, p); err != nil {
				t.Fatalf("Check after a kill: %v", err)
			}
		}
		t.Logf("%d of 24 kills fell between the families or tables", halves)
		if err := b.Remove(ns); err != nil {
			t.Fatal(err)
		}
		if got := saved(run, f); strings.Contains(got, chainPrefix) {
			t.Errorf("removal left\n%s", got)
		}
	})
}
