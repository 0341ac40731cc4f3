// Package measure runs a command and says what it cost. Peak memory is right
// only above this process's own: the kernel counts what a child shared with
// its parent before exec.
package measure

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A Command is a program with what it is given. Stdout goes nowhere.
type Command struct {
	Name  string // of the file
	Args  []string
	Env   []string
	Stdin []byte
}

// A Cost is what one run took, children included.
type Cost struct {
	Wall, CPU time.Duration
	Peak      int64 // bytes of resident memory
}

// Prepared is a command whose input is in place, so that running it costs no
// more than the exec.
type Prepared struct {
	cmd                   *Command
	stdin, stderr, stdout *os.File
}

// Prepare sets the input up. Not timed.
func (c *Command) Prepare() (*Prepared, error) {
	p := &Prepared{cmd: c}
	var err error
	for _, f := range []**os.File{&p.stdin, &p.stderr, &p.stdout} {
		if *f, err = tempFile(); err != nil {
			p.Close()
			return nil, err
		}
	}
	if _, err := p.stdin.Write(c.Stdin); err != nil {
		p.Close()
		return nil, err
	}
	_, err = p.stdin.Seek(0, io.SeekStart)
	return p, err
}

// Close lets go of the input.
func (p *Prepared) Close() {
	for _, f := range []*os.File{p.stdin, p.stderr, p.stdout} {
		if f != nil {
			f.Close()
		}
	}
}

// Run runs the command, once, from the calling thread's namespaces. An exit
// code other than 0 is an error that carries what the command said.
func (p *Prepared) Run() (Cost, error) {
	start := time.Now()
	proc, err := os.StartProcess(p.cmd.Name, append([]string{p.cmd.Name}, p.cmd.Args...), &os.ProcAttr{
		Env:   p.cmd.Env,
		Files: []*os.File{p.stdin, p.stdout, p.stderr},
	})
	if err != nil {
		return Cost{}, err
	}
	state, err := proc.Wait()
	wall := time.Since(start)
	if err != nil {
		return Cost{}, fmt.Errorf("waiting for %s: %w", p.cmd.Name, err)
	}
	usage := state.SysUsage().(*syscall.Rusage)
	if !state.Success() {
		return Cost{}, fmt.Errorf("%s: %s: %s", p.cmd.Name, state, strings.TrimSpace(said(p.stderr)+" "+said(p.stdout)))
	}
	return Cost{wall, state.UserTime() + state.SystemTime(), usage.Maxrss * 1024}, nil
}

// tempFile is a file that has no name any more.
func tempFile() (*os.File, error) {
	f, err := os.CreateTemp("", "preroute-measure-")
	if err != nil {
		return nil, err
	}
	return f, os.Remove(f.Name())
}

func said(f *os.File) string {
	b := make([]byte, 4096)
	n, _ := f.ReadAt(b, 0)
	return string(bytes.TrimSpace(b[:n]))
}

// Median is the middle one; with an even number, the upper of the two.
func Median[T cmp.Ordered](values []T) T {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}

// Add is the CNI ADD of a plugin that stands last in a chain, to a sandbox at
// the path netns, whose pod has a policy annotation, or none when it is empty.
func Add(plugin, netns, backend, policy string) (*Command, error) {
	annotations := map[string]string{"kubernetes.io/config.source": "api"}
	if policy != "" {
		annotations["preroute.io/policy"] = policy
	}
	stdin, err := json.Marshal(map[string]any{
		"cniVersion":    "1.0.0",
		"name":          "measure",
		"type":          "preroute",
		"backend":       backend,
		"capabilities":  map[string]bool{"io.kubernetes.cri.pod-annotations": true},
		"runtimeConfig": map[string]any{"io.kubernetes.cri.pod-annotations": annotations},
		"prevResult": map[string]any{
			"cniVersion": "1.0.0",
			"interfaces": []any{map[string]any{"name": "eth0", "sandbox": netns}},
			"ips": []any{
				map[string]any{"interface": 0, "address": "10.77.0.2/24", "gateway": "10.77.0.1"},
				map[string]any{"interface": 0, "address": "fd77::2/64", "gateway": "fd77::1"},
			},
		},
	})
	if err != nil {
		return nil, err
	}
	return &Command{
		Name:  plugin,
		Stdin: stdin,
		Env: []string{
			"CNI_COMMAND=ADD", "CNI_CONTAINERID=measure", "CNI_NETNS=" + netns, "CNI_IFNAME=eth0",
			"CNI_PATH=/opt/cni/bin", "PATH=" + os.Getenv("PATH"),
		},
	}, nil
}
