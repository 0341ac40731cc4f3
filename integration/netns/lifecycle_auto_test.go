package netns_test

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// noNFTVariable makes the test's own binary a launcher: it runs the command in
// its arguments as on a kernel without nf_tables.
const noNFTVariable = "PREROUTE_NETNS_WITHOUT_NFTABLES"

// withoutNFTables lets no netlink socket of netfilter be made any more, by a
// seccomp filter that the command and its children inherit, and becomes the
// command. What a kernel without CONFIG_NF_TABLES has is left: the legacy tables,
// which iptables reaches by socket options.
func withoutNFTables(argv []string) error {
	const (
		number   = 0  // offsetof(struct seccomp_data, nr)
		domain   = 16 // the low half of args[0]
		protocol = 32 // of args[2]
	)
	refuse := uint32(unix.SECCOMP_RET_ERRNO) | uint32(unix.EPROTONOSUPPORT)
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: number},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_SOCKET, Jf: 5},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: domain},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.AF_NETLINK, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: protocol},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.NETLINK_NETFILTER, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: refuse},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return fmt.Errorf("installing the seccomp filter: %w", errno)
	}
	return syscall.Exec(argv[0], argv, os.Environ())
}

// Where the kernel has no nf_tables, auto falls back to iptables and says why;
// nft refuses, and says what is missing and since when there is it.
func TestAutoFallsBack(t *testing.T) {
	p := newPod(t)
	without := func(l launch) launch {
		l.env[noNFTVariable] = "1"
		l.env["PATH"] = lab.legacy
		return l.under(os.Args[0])
	}
	before := p.dump()
	r := without(p.launch("ADD", policyNGINX, withConf("backend", "nft"))).must(t)
	if e := r.cniErr; r.exit == 0 || e == nil || !strings.Contains(e.Msg, "nf_tables") && !strings.Contains(e.Msg, "netfilter") || !strings.Contains(e.Msg, "Linux 3.1") {
		t.Fatalf("backend nft: want an error that names what is missing and since when there is it: %d %s", r.exit, r.stdout)
	}
	same(t, "a refused ADD changed something", p.dump(), before)

	r = without(p.launch("ADD", policyNGINX, withConf("backend", "auto"))).must(t)
	if r.exit != 0 {
		t.Fatalf("backend auto: %s %s", r.stdout, r.stderr)
	}
	if tables := p.legacyTables("ip"); len(tables) == 0 {
		t.Errorf("no legacy table was made")
	}
	if r := without(p.launch("CHECK", policyNGINX, withConf("backend", "auto"))).must(t); r.exit != 0 {
		t.Errorf("CHECK: %s", r.stdout)
	}
	r = without(p.command(policyNGINX, "check")).must(t)
	if r.exit != 0 || !strings.Contains(r.stdout, "backend: iptables, since ") || !strings.Contains(r.stdout, "Linux 3.1") {
		t.Errorf("preroute check does not say why it is iptables: %d %s%s", r.exit, r.stdout, r.stderr)
	}
	if r := without(p.launch("DEL", policyNGINX, withConf("backend", "auto"))).must(t); r.exit != 0 {
		t.Errorf("DEL: %s", r.stdout)
	}
	if left := p.dump(); strings.Contains(left, "PREROUTE") {
		t.Errorf("left behind after DEL:\n%s", left)
	}
}
