package netns_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
)

// Z1 and L7, by strace: which system calls an ADD makes.

// bareProgram does what a plugin cannot do without: it starts, reads stdin and
// writes stdout. What it asks of the kernel is the Go runtime's own.
const bareProgram = `package main

import (
	"io"
	"os"
)

func main() {
	b, err := io.ReadAll(os.Stdin)
	if err != nil {
		os.Exit(1)
	}
	os.Stdout.Write(b)
}
`

var bareGo = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(lab.dir, "bare-go")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	source, program := filepath.Join(dir, "main.go"), filepath.Join(dir, "program")
	if err := os.WriteFile(source, []byte(bareProgram), 0o644); err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, source)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building a bare Go program: %w\n%s", err, out)
	}
	return program, nil
})

// traced runs a launch under strace and returns the lines of its trace, without
// process IDs.
func traced(t *testing.T, l launch, args ...string) ([]string, result) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "trace")
	argv := append([]string{"strace", "-f", "-o", file, "-s", "256"}, args...)
	r := l.under(append(argv, "--")...).must(t)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(string(b)) {
		_, call, _ := strings.Cut(line, " ")
		lines = append(lines, strings.TrimSpace(call))
	}
	return lines, r
}

var syscallName = regexp.MustCompile(`^([a-z_0-9]+)\(`)

// filesIn are the paths that a trace opens or looks at, sorted.
func filesIn(trace []string) []string {
	path := regexp.MustCompile(`"([^"]*)"`)
	var files []string
	for _, line := range trace {
		switch syscallOf(line) {
		case "open", "openat", "openat2", "stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink", "readlinkat", "statfs":
			if m := path.FindStringSubmatch(line); m != nil {
				files = append(files, m[1])
			}
		}
	}
	slices.Sort(files)
	return files
}

func calls(trace []string, names ...string) []string {
	var out []string
	for _, line := range trace {
		if slices.Contains(names, syscallOf(line)) {
			out = append(out, line)
		}
	}
	return out
}

func syscallOf(line string) string {
	if m := syscallName.FindStringSubmatch(line); m != nil {
		return m[1]
	}
	return ""
}

// notForOthers are the system calls that no pod without a policy makes happen.
var notForOthers = []string{
	"socket", "socketpair", "connect", "bind", "sendto", "sendmsg", "sendmmsg",
	"setns", "unshare", "mount", "umount2", "fork", "vfork", "kill",
	"mkdir", "mkdirat", "unlink", "unlinkat", "rename", "renameat", "renameat2", "symlinkat", "linkat", "chmod", "fchmodat",
	"bpf", "init_module", "finit_module", "ioctl", "flock",
}

// TestPodsWithoutPolicyTouchNothing compares ADD with a bare Go program.
func TestPodsWithoutPolicyTouchNothing(t *testing.T) {
	program, err := bareGo()
	if err != nil {
		t.Fatal(err)
	}
	p := bare(t)
	before := p.exact()
	baseline, _ := traced(t, launch{argv: []string{program}, stdin: "{}", env: map[string]string{"PATH": os.Getenv("PATH")}})
	if len(calls(baseline, "execve")) != 1 || len(calls(baseline, "read")) == 0 {
		t.Fatalf("the trace of the bare program says nothing:\n%s", strings.Join(baseline, "\n"))
	}

	// What the trace of a pod that is ours shows, it would show of others too.
	trace, _ := traced(t, p.launch("ADD", policyNGINX))
	if n := len(calls(trace, notForOthers...)); n < 3 || len(filesIn(trace)) == 0 {
		t.Fatalf("the trace of an ADD with a policy shows %d system calls of interest:\n%s", n, strings.Join(trace, "\n"))
	}
	p.mustAdd(policyNone)

	path := func(value string) option { return withAnnotation("preroute.io/path", value) }
	inConf := withConf("policy", map[string]any{"v": 1, "proxy": map[string]any{"uids": []int{2102}}, "outbound": map[string]any{"port": 8900}})
	for _, tt := range []struct {
		name   string
		policy string
		opts   []option
	}{
		{"no annotation of ours", "", []option{withAnnotation("example.com/policy", policyNGINX)}},
		{"no annotations at all", "", []option{withConf("runtimeConfig", nil)}},
		{"policy null in the conflist", "", []option{withConf("policy", nil)}},
		{"path init", policyNGINX, []option{path("init")}},
		{"path none", policyNGINX, []option{path("none")}},
		{"path none beats the conflist's policy", "", []option{path("none"), inConf}},
		{"path init, policy that is no JSON", "{", []option{path("init")}},
		{"path none, a node socket that is dead", "", []option{path("none"), withConf("nodeSocket", "/nonexistent/node.sock")}},
	} {
		for _, command := range []string{"ADD", "CHECK", "DEL"} {
			t.Run(tt.name+" "+command, func(t *testing.T) {
				trace, r := traced(t, p.launch(command, tt.policy, tt.opts...))
				if err := r.err(); err != nil {
					t.Fatal(err)
				}
				if n := calls(trace, "execve", "execveat"); len(n) != 1 {
					t.Errorf("programs started: %q", n)
				}
				if bad := calls(trace, notForOthers...); len(bad) > 0 {
					t.Errorf("system calls of a pod that is not ours:\n%s", strings.Join(bad, "\n"))
				}
				for _, line := range calls(trace, "clone", "clone3") {
					if !strings.Contains(line, "CLONE_THREAD") {
						t.Errorf("a process was made: %s", line)
					}
				}
				for _, file := range filesIn(trace) {
					if !slices.Contains(filesIn(baseline), file) {
						t.Errorf("%s was opened or looked at, which a bare Go program does not do", file)
					}
				}
				if got, want := len(filesIn(trace)), len(filesIn(baseline)); got > want {
					t.Errorf("%d files opened or looked at; a bare Go program: %d", got, want)
				}
			})
		}
	}
	same(t, "a pod without a policy was changed", p.exact(), before)
}

// TestNoProgramIsStarted holds that an ADD, CHECK and removal by nft start no
// process and speak to nobody but the kernel and the report socket.
func TestNoProgramIsStarted(t *testing.T) {
	p := bare(t)
	for _, step := range []struct{ command, policy string }{
		{"ADD", policyKuma}, {"ADD", policyTProxy}, {"CHECK", policyTProxy}, {"ADD", policyNone}, {"ADD", policyNGINX}, {"DEL", policyNGINX},
	} {
		for _, backend := range []string{"nft", "auto"} {
			trace, r := traced(t, p.launch(step.command, step.policy, withConf("backend", backend)))
			if err := r.err(); err != nil {
				t.Fatalf("%s %s: %v", step.command, step.policy, err)
			}
			if n := calls(trace, "execve", "execveat"); len(n) != 1 {
				t.Errorf("%s with %s: programs started: %q", step.command, backend, n)
			}
			for _, line := range calls(trace, "connect", "bind", "sendto") {
				if !strings.Contains(line, "AF_NETLINK") && !strings.Contains(line, "/run/preroute/report.sock") && !strings.Contains(line, "NULL, 0") {
					t.Errorf("%s with %s: %s", step.command, backend, line)
				}
			}
			if net := calls(trace, "socket"); slices.ContainsFunc(net, func(s string) bool { return strings.Contains(s, "AF_INET") }) {
				t.Errorf("%s with %s: internet sockets: %q", step.command, backend, net)
			}
			if bad := calls(trace, "mkdir", "mkdirat", "rename", "renameat", "flock", "init_module", "finit_module", "mount"); len(bad) > 0 {
				t.Errorf("%s with %s: %q", step.command, backend, bad)
			}
		}
	}
}
