// Package netns_test holds Preroute to its contract from outside: the built
// plugin is driven through stdin and the CNI_* variables alone, in network
// namespaces of its own, and judged by what sockets in them see.
//
// Limits: it needs root, and the programs nft, iptables (both flavours), ip and
// haproxy; without them it fails, it does not skip. One kernel is tried, the
// one it runs on. UDP other than DNS is not in it yet.
//
// The lab has three parts. A pod (lab_pod_test.go, lab_netns_test.go) is a
// network namespace with a veth to a second one, its world. An agent
// (lab_agent_test.go) is this very test binary, started again inside one of the
// two with a UID and GID, so that its sockets have the owner that the rules ask
// for; it does what it is told line by line (lab_command_test.go,
// lab_dns_test.go). This file builds the plugin and runs it.
//
// The tests: rows_*_test.go are the table "What packets do", haproxy_test.go the
// same with a proxy of other people's, lifecycle_*_test.go the life cycle.
package netns_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	policyAnnotation = "preroute.io/policy"
	annotationsKey   = "io.kubernetes.cri.pod-annotations"

	// pluginVariable in the environment names a program to judge in place of
	// the one that this checkout builds.
	pluginVariable = "PREROUTE_LAB_PLUGIN"
)

// lab is what all tests share: read-only once TestMain has made it.
var lab struct {
	dir    string // temporary, readable for every UID
	plugin string // the built program
	legacy string // a folder in which iptables is the legacy flavour
	bare   string // an empty folder: a PATH without any program
}

func TestMain(m *testing.M) {
	if os.Getenv(agentVariable) != "" {
		os.Exit(agentMain(os.Stdin, os.Stdout))
	}
	if os.Getenv(noNFTVariable) != "" {
		fmt.Fprintln(os.Stderr, "integration/netns:", withoutNFTables(os.Args[1:]))
		os.Exit(1)
	}
	code, err := runTests(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "integration/netns:", err)
		code = 1
	}
	os.Exit(code)
}

func runTests(m *testing.M) (code int, err error) {
	if os.Getuid() != 0 {
		return 1, errors.New("making network namespaces needs root; run it as root")
	}
	if lab.dir, err = os.MkdirTemp("", "preroute-netns-"); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(lab.dir)) }()
	if err := os.Chmod(lab.dir, 0o755); err != nil {
		return 1, err
	}
	lab.bare = filepath.Join(lab.dir, "bare")
	lab.legacy = filepath.Join(lab.dir, "legacy")
	for _, dir := range []string{lab.bare, lab.legacy} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return 1, err
		}
	}
	multi, err := exec.LookPath("xtables-legacy-multi")
	if err != nil {
		return 1, fmt.Errorf("looking for the legacy iptables: %w; install the package iptables", err)
	}
	for _, name := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"} {
		if err := os.Symlink(multi, filepath.Join(lab.legacy, name)); err != nil {
			return 1, err
		}
	}
	if lab.plugin = os.Getenv(pluginVariable); lab.plugin == "" {
		lab.plugin = filepath.Join(lab.dir, "preroute")
		build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", lab.plugin, "github.com/preroute/preroute/plugin")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return 1, fmt.Errorf("building the plugin: %w\n%s", err, out)
		}
	}
	sweep()
	return m.Run(), nil
}

// inputs tells go test, which remembers results and looks at what a test opens,
// that this one depends on the plugin's sources, though it imports none of them.
var inputs = sync.OnceValue(func() error {
	os.Getenv(pluginVariable)
	return filepath.WalkDir(filepath.Join("..", "..", "plugin"), func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			_, err = os.Stat(path)
		}
		return err
	})
})

// A flavour is a way to program the rules: a backend, and the PATH that decides
// which iptables it finds.
type flavour struct {
	name    string
	backend string
	path    string // "" means this process's own
}

// flavours are the backends that must behave alike. It is a function since the
// folder of the legacy programs is not known before TestMain.
func flavours() []flavour {
	return []flavour{
		{name: "nft", backend: "nft", path: lab.bare}, // L7: no program of the host is needed
		{name: "iptables", backend: "iptables"},
		{name: "iptables-legacy", backend: "iptables", path: lab.legacy},
	}
}

// A call is one run of the plugin as an option may change it.
type call struct {
	conf map[string]any
	env  map[string]string
}

type option func(*call)

// using sets the backend and the PATH of a flavour.
func using(f flavour) option {
	return func(c *call) {
		c.conf["backend"] = f.backend
		if f.path != "" {
			c.env["PATH"] = f.path
		}
	}
}

// withConf sets a key of the network configuration; nil removes it.
func withConf(key string, value any) option {
	return func(c *call) {
		if value == nil {
			delete(c.conf, key)
			return
		}
		c.conf[key] = value
	}
}

// withEnv sets a variable of the plugin's environment.
func withEnv(key, value string) option { return func(c *call) { c.env[key] = value } }

// withAnnotation adds an annotation of the pod beside the policy's.
func withAnnotation(key, value string) option {
	return func(c *call) {
		c.conf["runtimeConfig"].(map[string]any)[annotationsKey].(map[string]string)[key] = value
	}
}

// A cniError is what a plugin prints on stdout when it fails.
type cniError struct {
	CNIVersion string `json:"cniVersion"`
	Code       uint   `json:"code"`
	Msg        string `json:"msg"`
	Details    string `json:"details"`
}

func (e *cniError) Error() string {
	return fmt.Sprintf("CNI error %d: %s; %s", e.Code, e.Msg, e.Details)
}

// A result is one finished run of the plugin.
type result struct {
	stdout, stderr string
	cniErr         *cniError // nil when exit is 0
	exit           int
}

// err is nil when the plugin succeeded.
func (r result) err() error {
	if r.exit == 0 {
		return nil
	}
	if r.cniErr != nil {
		return r.cniErr
	}
	return fmt.Errorf("exit status %d without a CNI error\nstdout: %s\nstderr: %s", r.exit, r.stdout, r.stderr)
}

// runPlugin runs the plugin with a CNI command. env is the whole environment
// but for CNI_COMMAND; where it names no PATH it gets this process's own.
func runPlugin(t testing.TB, command, stdin string, env map[string]string) result {
	t.Helper()
	env = maps.Clone(env)
	if env == nil {
		env = map[string]string{}
	}
	env["CNI_COMMAND"] = command
	return runProgram(t, nil, stdin, env)
}

// runProgram runs the built program with arguments, in this process's own
// namespaces.
func runProgram(t testing.TB, args []string, stdin string, env map[string]string) result {
	t.Helper()
	if err := inputs(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, lab.plugin, args...)
	cmd.Env = []string{}
	if _, ok := env["PATH"]; !ok {
		cmd.Env = append(cmd.Env, "PATH="+os.Getenv("PATH"))
	}
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if ctx.Err() != nil {
		t.Fatalf("the plugin did not end within a minute\nstderr: %s", stderr.String())
	}
	var status *exec.ExitError
	if err != nil && !errors.As(err, &status) {
		t.Fatalf("running the plugin: %v", err)
	}
	r := result{stdout: stdout.String(), stderr: stderr.String(), exit: cmd.ProcessState.ExitCode()}
	if r.exit != 0 && env["CNI_COMMAND"] != "" {
		d := json.NewDecoder(strings.NewReader(r.stdout))
		var e cniError
		if err := d.Decode(&e); err == nil {
			r.cniErr = &e
			if rest, _ := io.ReadAll(d.Buffered()); len(bytes.TrimSpace(rest)) > 0 {
				t.Errorf("something follows the CNI error on stdout: %s", rest)
			}
		}
	}
	return r
}
