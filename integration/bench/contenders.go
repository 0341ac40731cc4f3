package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/preroute/preroute/integration/measure"
	"github.com/preroute/preroute/integration/sandbox"
)

// A contender is one way to get a pod ready, or to get nothing done at all.
type contender struct {
	name     string
	backend  string // "" where it is not Preroute with a policy
	commands func(netns string) ([]*measure.Command, error)
	inPod    bool // the commands run in the pod's namespace
}

// The contenders' order is that of the tables.
type contenders struct {
	bin                               string
	skeleton, noPolicy, nft, iptables *contender
	nftPorts10, nftPorts1000          *contender
	nftNets10, nftNets1000            *contender
	iptPorts10, iptPorts1000          *contender
	iptNets10, iptNets1000            *contender
	restore1, restore2, execs20       *contender
}

// The contract's example, less UDP.
const policy = `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"exceptPorts":"8887,8895-8896"},"outbound":{"port":8900,"exceptPorts":"53"}}`

func policyWithPorts(n int) string {
	items := make([]string, n)
	for i := range items {
		items[i] = fmt.Sprint(10000 + 2*i) // no two of them touch
	}
	return fmt.Sprintf(`{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901},"outbound":{"port":8900,"exceptPorts":"%s"}}`, strings.Join(items, ","))
}

func policyWithNets(n int) string {
	items := make([]string, n)
	for i := range items {
		items[i] = fmt.Sprintf(`"10.%d.%d.0/24"`, i/100, 2*(i%100))
		if i%2 == 1 {
			items[i] = fmt.Sprintf(`"fd00:%x::/64"`, i)
		}
	}
	return fmt.Sprintf(`{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901},"outbound":{"port":8900,"exceptNets":[%s]}}`, strings.Join(items, ","))
}

func newContenders(bin string) (*contenders, error) {
	preroute := filepath.Join(bin, "preroute")
	add := func(name, plugin, backend, policy string) *contender {
		c := &contender{name: name, commands: func(netns string) ([]*measure.Command, error) {
			cmd, err := measure.Add(plugin, netns, backend, policy)
			return []*measure.Command{cmd}, err
		}}
		if policy != "" {
			c.backend = backend
		}
		return c
	}
	nft := func(name, policy string) *contender { return add("preroute nft, "+name, preroute, "nft", policy) }
	ipt := func(name, policy string) *contender {
		return add("preroute iptables, "+name, preroute, "iptables", policy)
	}
	c := &contenders{
		bin:          bin,
		skeleton:     add("bare CNI skeleton", filepath.Join(bin, "skeleton"), "nft", ""),
		noPolicy:     add("preroute, no policy", preroute, "nft", ""),
		nft:          nft("policy", policy),
		nftPorts10:   nft("10 ports", policyWithPorts(10)),
		nftPorts1000: nft("1000 ports", policyWithPorts(1000)),
		nftNets10:    nft("10 nets", policyWithNets(10)),
		nftNets1000:  nft("1000 nets", policyWithNets(1000)),
		iptables:     ipt("policy", policy),
		iptPorts10:   ipt("10 ports", policyWithPorts(10)),
		iptPorts1000: ipt("1000 ports", policyWithPorts(1000)),
		iptNets10:    ipt("10 nets", policyWithNets(10)),
		iptNets1000:  ipt("1000 nets", policyWithNets(1000)),
	}
	v4, v6, err := c.dump()
	if err != nil {
		return nil, fmt.Errorf("learning the equivalent iptables rules: %w", err)
	}
	restore := func(program string, text []byte) *measure.Command {
		return &measure.Command{Name: program, Args: []string{"--noflush"}, Stdin: text, Env: os.Environ()}
	}
	r4, err := lookPath("iptables-nft-restore")
	if err != nil {
		return nil, err
	}
	r6, err := lookPath("ip6tables-nft-restore")
	if err != nil {
		return nil, err
	}
	fixed := func(name string, commands ...*measure.Command) *contender {
		return &contender{name: name, inPod: true, commands: func(string) ([]*measure.Command, error) { return commands, nil }}
	}
	c.restore1 = fixed("1 iptables-restore (IPv4)", restore(r4, v4))
	c.restore2 = fixed("2 iptables-restore (IPv4, IPv6)", restore(r4, v4), restore(r6, v6))
	execs, err := oneByOne(v4, v6, 20)
	if err != nil {
		return nil, err
	}
	c.execs20 = fixed("20 iptables execs", execs...)
	return c, nil
}

// dump applies the policy with the iptables backend and returns the rules as
// iptables-save prints them: the same work for the programs to do.
func (c *contenders) dump() (v4, v6 []byte, err error) {
	n, err := sandbox.New()
	if err != nil {
		return nil, nil, err
	}
	defer n.Close()
	if _, err := c.iptables.run(n); err != nil {
		return nil, nil, err
	}
	err = n.Do(func() error {
		if v4, err = exec.Command("iptables-nft-save").Output(); err != nil {
			return err
		}
		v6, err = exec.Command("ip6tables-nft-save").Output()
		return err
	})
	if err == nil && !bytes.Contains(v4, []byte("-A PREROUTE_")) {
		err = errors.New("iptables-nft-save shows no rule of the iptables backend")
	}
	return v4, v6, err
}

// oneByOne makes at most n iptables commands of two dumps, a rule each.
func oneByOne(v4, v6 []byte, n int) ([]*measure.Command, error) {
	var cmds []*measure.Command
	for _, family := range []struct {
		program string
		dump    []byte
	}{{"iptables-nft", v4}, {"ip6tables-nft", v6}} {
		path, err := lookPath(family.program)
		if err != nil {
			return nil, err
		}
		table, half := "", 0
		for line := range strings.Lines(string(family.dump)) {
			words := split(line)
			if len(words) == 0 || half == n/2 {
				continue
			}
			var args []string
			switch {
			case line[0] == '*':
				table = words[0][1:]
				continue
			case strings.HasPrefix(line, ":PREROUTE_"):
				args = []string{"-w", "-t", table, "-N", words[0][1:]}
			case strings.HasPrefix(line, "-A"):
				args = append([]string{"-w", "-t", table}, words...)
			default:
				continue
			}
			half++
			cmds = append(cmds, &measure.Command{Name: path, Args: args, Env: os.Environ()})
		}
	}
	if len(cmds) != n {
		return nil, fmt.Errorf("the rules give %d commands, want %d", len(cmds), n)
	}
	return cmds, nil
}

// split takes a line of iptables-save apart, where a comment stands in quotes.
func split(line string) []string {
	var words []string
	for i, part := range strings.Split(strings.TrimSpace(line), `"`) {
		if i%2 == 1 {
			words = append(words, part)
		} else {
			words = append(words, strings.Fields(part)...)
		}
	}
	return words
}

func lookPath(program string) (string, error) {
	path, err := exec.LookPath(program)
	if err != nil {
		return "", fmt.Errorf("%w; install iptables (make bench does)", err)
	}
	return path, nil
}

// A job is a contender ready to run on one pod: what prepares it is not timed.
type job struct {
	c        *contender
	netns    *sandbox.Netns
	prepared []*measure.Prepared
}

func (c *contender) prepare(n *sandbox.Netns) (*job, error) {
	j := &job{c: c, netns: n}
	cmds, err := c.commands(n.Path())
	if err != nil {
		return nil, err
	}
	for _, cmd := range cmds {
		p, err := cmd.Prepare()
		if err != nil {
			return nil, err
		}
		j.prepared = append(j.prepared, p)
	}
	return j, nil
}

// enter calls fn where the job's commands belong.
func (j *job) enter(fn func() error) error {
	if j.c.inPod {
		return j.netns.Do(fn)
	}
	return fn()
}

// run runs the commands one after the other, from the thread that enter gave.
func (j *job) run() (measure.Cost, error) {
	var sum measure.Cost
	start := time.Now()
	for _, p := range j.prepared {
		cost, err := p.Run()
		if err != nil {
			return sum, err
		}
		sum.CPU += cost.CPU
		sum.Peak = max(sum.Peak, cost.Peak)
	}
	sum.Wall = time.Since(start)
	return sum, nil
}

func (j *job) close() {
	for _, p := range j.prepared {
		p.Close()
	}
}

// run does everything for one pod.
func (c *contender) run(n *sandbox.Netns) (cost measure.Cost, err error) {
	j, err := c.prepare(n)
	if err != nil {
		return cost, err
	}
	defer j.close()
	err = j.enter(func() error {
		cost, err = j.run()
		return err
	})
	if err != nil {
		err = fmt.Errorf("%s: %w", c.name, err)
	}
	return cost, err
}
