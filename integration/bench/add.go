package main

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/preroute/preroute/integration/measure"
	"github.com/preroute/preroute/integration/sandbox"
)

// benchAdd runs every contender in turns, one at a time, each on a pod of its own.
func benchAdd(ctx context.Context, c *contenders, g *goals, scale int) error {
	list := []*contender{
		c.skeleton, c.noPolicy, c.nft, c.nftPorts10, c.nftPorts1000, c.nftNets10, c.nftNets1000,
		c.iptables, c.iptPorts10, c.iptPorts1000, c.iptNets10, c.iptNets1000,
		c.restore1, c.restore2, c.execs20,
	}
	rounds := 10 * scale
	walls := map[*contender][]time.Duration{}
	cpus := map[*contender][]time.Duration{}
	pods, closePods, err := sandbox.Several(rounds*len(list), sandbox.New) // every ADD has a pod of its own
	if err != nil {
		return err
	}
	defer closePods()
	for round := range rounds {
		for i, turn := range rand.Perm(len(list)) { // none always has the same neighbour
			if err := ctx.Err(); err != nil {
				return err
			}
			k := list[turn]
			cost, err := k.run(pods[round*len(list)+i])
			if err != nil {
				return err
			}
			walls[k] = append(walls[k], cost.Wall)
			cpus[k] = append(cpus[k], cost.CPU)
		}
	}
	t := newTable(fmt.Sprintf("One ADD, both families (rounds: %d)", rounds),
		"", "wall ms", "CPU ms", "peak MB", "x skeleton", "x restore", "x 20 execs")
	for _, k := range list {
		wall, cpu := measure.Median(walls[k]), measure.Median(cpus[k])
		peak := "–" // the programs of others are not judged by their memory
		if !k.inPod {
			held, err := c.peak(k)
			if err != nil {
				return err
			}
			peak = fmt.Sprintf("%.1f", float64(held)/1e6)
			if k.backend == "nft" {
				g.peak = max(g.peak, held)
			}
		}
		t.row(k.name, ms(wall), ms(cpu), peak,
			ratio(wall, measure.Median(walls[c.skeleton])), ratio(wall, measure.Median(walls[c.restore1])), ratio(wall, measure.Median(walls[c.execs20])))
	}
	t.print()

	over := func(a, b *contender) float64 {
		return float64(measure.Median(walls[a])) / float64(measure.Median(walls[b]))
	}
	g.atMost("ADD with a policy, nft, against the skeleton", over(c.nft, c.skeleton), 1.6, "x")
	g.atMost("ADD without a policy, against the skeleton", over(c.noPolicy, c.skeleton), 1.05, "x")
	g.atMost("1000 excepted ports against 10, nft", over(c.nftPorts1000, c.nftPorts10), 1.5, "x")
	g.atMost("1000 excepted nets against 10, nft", over(c.nftNets1000, c.nftNets10), 1.5, "x")
	g.atMost("1000 excepted ports against 10, iptables", over(c.iptPorts1000, c.iptPorts10), 1.5, "x")
	g.atMost("1000 excepted nets against 10, iptables", over(c.iptNets1000, c.iptNets10), 1.5, "x")
	return nil
}

// peak is the most memory that one of the contender's processes held. It is
// asked of a small process in between: the kernel counts in what a child
// shared with its parent before exec, and this program is not small.
func (c *contenders) peak(k *contender) (int64, error) {
	n, err := sandbox.New()
	if err != nil {
		return 0, err
	}
	defer n.Close()
	cmds, err := k.commands(n.Path())
	if err != nil {
		return 0, err
	}
	var most int64
	for _, cmd := range cmds {
		small := exec.Command(filepath.Join(c.bin, "bench"), "-peak", cmd.Name)
		small.Env, small.Stdin = cmd.Env, bytes.NewReader(cmd.Stdin)
		out, err := small.Output()
		if err != nil {
			return 0, fmt.Errorf("peak memory of %s: %w", k.name, err)
		}
		peak, err := strconv.ParseInt(string(bytes.TrimSpace(out)), 10, 64)
		if err != nil {
			return 0, err
		}
		most = max(most, peak)
	}
	return most, nil
}

// printPeak is the small process: it passes its input and environment on.
func printPeak(program string) int {
	peak, err := peakOf(program)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	fmt.Println(peak)
	return 0
}

func peakOf(program string) (int64, error) {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return 0, err
	}
	p, err := os.StartProcess(program, []string{program}, &os.ProcAttr{
		Env: os.Environ(), Files: []*os.File{os.Stdin, null, os.Stderr},
	})
	if err != nil {
		return 0, err
	}
	state, err := p.Wait()
	if err != nil {
		return 0, err
	}
	if !state.Success() {
		return 0, fmt.Errorf("%s: %s", program, state)
	}
	return state.SysUsage().(*syscall.Rusage).Maxrss * 1024, nil
}
