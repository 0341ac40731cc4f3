package netfilter

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A flavour is one of the two ways in which iptables programs the kernel. Both
// can be in effect in one namespace at once, and neither shows what the other did.
type flavour string

const (
	flavourNft    flavour = "nft"    // rules in nftables' tables ip nat, ip6 nat, ...
	flavourLegacy flavour = "legacy" // rules in the kernel's own ip_tables
)

// Directories that PATH may lack where a container runtime starts us.
const systemDirs = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"

// find returns the path of a program, "" where there is none. [exec.LookPath]
// would search this process's PATH only.
func (t *IPTables) find(name string) string {
	for _, dir := range filepath.SplitList(t.path) {
		path := filepath.Join(dir, name)
		if st, err := os.Stat(path); filepath.IsAbs(dir) && err == nil && !st.IsDir() && st.Mode()&0o111 != 0 {
			return path
		}
	}
	return ""
}

// flavourOf asks a program for its flavour; "--version" touches nothing.
func flavourOf(path string) (flavour, error) {
	out, err := exec.Command(path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("asking %s for its version: %w", path, err)
	}
	if bytes.Contains(out, []byte("nf_tables")) {
		return flavourNft, nil
	}
	return flavourLegacy, nil // before 1.8 it does not say, and knew no other
}

// program finds iptables-restore or iptables-save of a family and a flavour.
func (t *IPTables) program(what string, is4 bool, f flavour) (string, error) {
	base := "ip6tables-"
	if is4 {
		base = "iptables-"
	}
	if path := t.find(base + string(f) + "-" + what); path != "" {
		return path, nil
	}
	if path := t.find(base + what); path != "" {
		if have, err := flavourOf(path); err != nil {
			return "", err
		} else if have == f {
			return path, nil
		}
	}
	return "", &Unsupported{
		What: fmt.Sprintf("the iptables backend found no %s%s-%s here", base, f, what),
		Need: `the iptables package (1.8.5 or newer) on this machine, or "backend": "nft", which needs no program`,
	}
}

// systemFlavour is that of the machine's iptables, or else of the one there is.
func (t *IPTables) systemFlavour() (flavour, error) {
	if path := t.find("iptables-restore"); path != "" {
		return flavourOf(path)
	}
	for _, f := range []flavour{flavourNft, flavourLegacy} {
		if t.find("iptables-"+string(f)+"-restore") != "" {
			return f, nil
		}
	}
	return "", &Unsupported{
		What: "the iptables backend found no iptables-restore here",
		Need: `the iptables package (1.8.5 or newer) on this machine, or "backend": "nft", which needs no program`,
	}
}

// kernelHasIPv6 is false where the kernel was started without. There ip6tables
// fails, and no packet can pass.
func kernelHasIPv6() bool {
	_, err := os.Stat("/proc/thread-self/net/if_inet6")
	return err == nil
}

// save reads everything of one family and flavour.
func (t *IPTables) save(is4 bool, f flavour) (ruleset, error) {
	path, err := t.program("save", is4, f)
	if err != nil {
		return nil, err
	}
	// Not go-iptables, whose List is one process per chain and, in the legacy
	// flavour, waits for the machine's lock; iptables-save takes none.
	var stderr bytes.Buffer
	cmd := exec.Command(path)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, programError(path, stderr.String(), "", err)
	}
	return parseSave(string(out), is4)
}

// A job is one run of iptables-restore.
type job struct {
	is4     bool
	flavour flavour
	input   string
}

// restore runs jobs at the same time. All of them are started before any gets
// its input, and each gets the whole of it at once: from then on it runs to its
// end, also when this process is killed. The lock is inherited, so that the
// namespace stays locked for that long.
//
// Without a lock file of its own, iptables-restore in the legacy flavour would
// wait for the machine's, /run/xtables.lock, which anybody may hold for as long as
// they like, or which cannot be made under a read-only /run. Ours is a file in
// memory that nobody else has: what keeps two of us apart is the lock on the
// namespace. The variable is known since 1.8.5; older ones wait, at most 5 s.
func (t *IPTables) restore(lock *os.File, jobs ...job) error {
	var runs []*run
	var errs []error
	for _, j := range jobs {
		if j.input == "" {
			continue
		}
		path, err := t.program("restore", j.is4, j.flavour)
		if err != nil {
			errs = append(errs, err)
			break
		}
		r := &run{job: j, cmd: exec.Command(path, "--noflush", "-w", "5")}
		if err := r.start(lock); err != nil {
			errs = append(errs, fmt.Errorf("starting %s: %w", path, err))
			break
		}
		runs = append(runs, r)
	}
	for _, r := range runs {
		if len(errs) == 0 { // else it reads nothing, and does nothing
			// An error here is that it ended early; Wait says why.
			_, _ = r.stdin.WriteString(r.input)
		}
		r.stdin.Close()
	}
	for _, r := range runs {
		if err := r.cmd.Wait(); err != nil {
			errs = append(errs, programError(r.cmd.Path, r.stderr.String(), r.input, err))
		}
	}
	return errors.Join(errs...)
}

type run struct {
	job
	cmd    *exec.Cmd
	stdin  *os.File
	stderr bytes.Buffer
}

func (r *run) start(lock *os.File) error {
	fd, err := unix.MemfdCreate("xtables.lock", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("making a lock file in memory: %w", err)
	}
	lockFile := os.NewFile(uintptr(fd), "xtables.lock")
	defer lockFile.Close()
	in, out, err := os.Pipe()
	if err != nil {
		return err
	}
	defer in.Close()
	if len(r.input) > 1<<16 { // what a pipe holds
		// Where the limit on pipes forbids more, writing takes as long as reading.
		_, _ = unix.FcntlInt(out.Fd(), unix.F_SETPIPE_SZ, len(r.input))
	}
	r.stdin, r.cmd.Stdin, r.cmd.Stderr = out, in, &r.stderr
	r.cmd.ExtraFiles = []*os.File{lock, lockFile} // 3 and 4
	r.cmd.Env = append(os.Environ(), "LC_ALL=C", "XTABLES_LOCKFILE=/proc/self/fd/4")
	if err := r.cmd.Start(); err != nil {
		out.Close()
		return err
	}
	return nil
}

// programError says what a program of iptables said, and about which line.
func programError(path, stderr, input string, err error) error {
	lines := slices.DeleteFunc(strings.Split(stderr, "\n"), func(s string) bool { return s == "" || strings.HasPrefix(s, "Try `") })
	said := strings.Join(lines, "; ")
	name := filepath.Base(path)
	if said == "" {
		said = "it said nothing"
	}
	if line := failedLine(stderr, input); line != "" {
		said = fmt.Sprintf("%s; the line is %q", said, line)
	}
	err = fmt.Errorf("%s: %w: %s", name, err, said)
	for _, lack := range []string{"missing kernel module", "do you need to insmod", "No chain/target/match by that name", "not supported", "Couldn't load"} {
		if strings.Contains(stderr, lack) {
			return &Unsupported{
				What: "iptables in this pod",
				Need: "a kernel with xt_REDIRECT, xt_owner, xt_addrtype, xt_multiport, xt_comment, and for tproxy and dns xt_TPROXY, xt_CT, xt_conntrack, xt_connmark and xt_mark",
				Err:  err,
			}
		}
	}
	for _, denied := range []string{"you must be root", "Operation not permitted", "unable to initialize table"} {
		if strings.Contains(stderr, denied) {
			return fmt.Errorf("%w; it needs the capability NET_ADMIN, and in the legacy flavour NET_RAW", err)
		}
	}
	return err
}

// failedLine finds the line that iptables-restore complained of.
func failedLine(stderr, input string) string {
	words := strings.FieldsFunc(stderr, func(r rune) bool { return strings.ContainsRune(" :\n\t", r) })
	lines := strings.Split(input, "\n")
	for i, w := range words[:max(0, len(words)-1)] {
		if n, err := strconv.Atoi(words[i+1]); w == "line" && err == nil && n > 0 && n <= len(lines) {
			return lines[n-1]
		}
	}
	return ""
}
