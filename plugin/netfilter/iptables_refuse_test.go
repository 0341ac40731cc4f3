package netfilter

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// What cannot work says so, and what would.
func TestIPTablesRefuses(t *testing.T) {
	wantUnsupported := func(t *testing.T, err error, say ...string) {
		t.Helper()
		var u *Unsupported
		if !errors.As(err, &u) {
			t.Fatalf("got %v, want an *Unsupported", err)
		}
		for _, s := range say {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%q does not say %q", err, s)
			}
		}
	}
	t.Run("udp", func(t *testing.T) {
		ns, _ := newNS(t)
		_, err := NewIPTables().Apply(ns, parse(t, `{"v":1,"udp":{"outboundPort":8908}}`))
		wantUnsupported(t, err, "udp")
	})
	t.Run("no program", func(t *testing.T) {
		ns, _ := newNS(t)
		_, err := (&IPTables{path: t.TempDir()}).Apply(ns, parse(t, redirectPolicy))
		wantUnsupported(t, err, "iptables-restore", "iptables package", `"backend": "nft"`)
	})
	t.Run("no program for IPv6", func(t *testing.T) {
		ns, run := newNS(t)
		b := flavoured(t, flavourNft)
		if err := os.Remove(filepath.Join(b.path, "ip6tables-nft-restore")); err != nil {
			t.Fatal(err)
		}
		_, err := b.Apply(ns, parse(t, redirectPolicy))
		wantUnsupported(t, err, "ip6tables-nft-restore")
		if got := run("nft", "list", "ruleset"); got != "" {
			t.Errorf("left behind:\n%s", got)
		}
	})
	t.Run("hostUsers: false", func(t *testing.T) {
		ns := usernsNS(t)
		_, err := NewIPTables().Apply(ns, parse(t, redirectPolicy))
		wantUnsupported(t, err, "hostUsers: false", `"backend": "nft"`)
		apply(t, NewIPTables(), ns, parse(t, `{"v":1,"inbound":{"port":8901}}`)) // names no owner
	})
}

// usernsNS makes a network namespace that a user namespace of its own owns.
func usernsNS(t *testing.T) int {
	t.Helper()
	cmd := exec.Command("cat")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: 100000, Size: 65536}},
		GidMappings: []syscall.SysProcIDMap{{HostID: 100000, Size: 65536}},
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stdin.Close(); _ = cmd.Wait() })
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return int(f.Fd())
}
