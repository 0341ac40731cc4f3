package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"time"

	"github.com/preroute/preroute/integration/measure"
	"github.com/preroute/preroute/integration/sandbox"
)

// timing runs ADD beside the bare skeleton plugin, in turns, each in a fresh
// namespace, and prints medians. The figures are shown, not judged: a busy
// machine is no fault of the plugin's.
func timing(ctx context.Context, t *term, rt *runtime, bin, backend string, runs int) error {
	preroute, skeleton := filepath.Join(bin, "preroute"), filepath.Join(bin, "skeleton")
	kinds := []struct{ name, plugin, policy string }{
		{"a bare CNI plugin", skeleton, ""},
		{"a pod without a policy", preroute, ""},
		{"the pod above", preroute, demoPolicy},
	}
	pods, closePods, err := sandbox.Several(runs*len(kinds), newNetns)
	if err != nil {
		return err
	}
	defer closePods()
	walls, used := make([][]time.Duration, len(kinds)), 0
	for range runs {
		for _, i := range rand.Perm(len(kinds)) { // none always has the same neighbour
			if err := ctx.Err(); err != nil {
				return err
			}
			wall, err := timeAdd(rt, pods[used], kinds[i].plugin, backend, kinds[i].policy)
			if err != nil {
				return fmt.Errorf("%s: %w", kinds[i].name, err)
			}
			used++
			walls[i] = append(walls[i], wall)
		}
	}
	base := measure.Median(walls[0])
	for i, k := range kinds {
		m := measure.Median(walls[i])
		took := fmt.Sprintf("%.2f ms", float64(m.Microseconds())/1000)
		if i > 0 {
			took += fmt.Sprintf(", %.2f times that", float64(m)/float64(base))
		}
		t.note(k.name, took, fmt.Sprintf("median of %d, in turns", runs))
	}
	return nil
}

func timeAdd(rt *runtime, n *sandbox.Netns, plugin, backend, policy string) (time.Duration, error) {
	cmd, err := measure.Add(plugin, n.Path(), backend, policy)
	if err != nil {
		return 0, err
	}
	p, err := cmd.Prepare()
	if err != nil {
		return 0, err
	}
	defer p.Close()
	var cost measure.Cost
	err = rt.node.Do(func() (err error) {
		cost, err = p.Run()
		return err
	})
	return cost.Wall, err
}
