package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/preroute/preroute/integration/measure"
	"github.com/preroute/preroute/integration/sandbox"
)

// benchParallel starts many pods at the same instant, as a node does that
// comes back.
func benchParallel(ctx context.Context, c *contenders, g *goals, scale int) error {
	list := []*contender{c.skeleton, c.noPolicy, c.nft, c.nftPorts1000, c.iptables, c.restore2, c.execs20}
	sizes := []int{1, 16, 64}
	rounds := 1 + 2*scale
	type key struct {
		c *contender
		n int
	}
	rates, walls := map[key][]float64{}, map[key][]time.Duration{}
	failed := 0
	for range rounds {
		for _, n := range sizes {
			for _, turn := range rand.Perm(len(list) * max(1, 16/n)) { // bursts of one are short: more of them
				if err := ctx.Err(); err != nil {
					return err
				}
				k := list[turn%len(list)]
				all, each, errs := burst(k, n)
				if k.backend != "" {
					failed += len(errs)
				}
				if len(each) == 0 {
					return fmt.Errorf("%d at once, none succeeded: %w", n, errs[0])
				}
				rates[key{k, n}] = append(rates[key{k, n}], float64(len(each))/all.Seconds())
				walls[key{k, n}] = append(walls[key{k, n}], measure.Median(each))
			}
		}
	}
	t := newTable(fmt.Sprintf("Pods at once (rounds: %d)", rounds), "",
		"1: ADD/s", "16: ADD/s", "64: ADD/s", "64: ms each", "64: x skeleton")
	for _, k := range list {
		t.row(k.name,
			fmt.Sprintf("%.0f", measure.Median(rates[key{k, 1}])),
			fmt.Sprintf("%.0f", measure.Median(rates[key{k, 16}])),
			fmt.Sprintf("%.0f", measure.Median(rates[key{k, 64}])),
			ms(measure.Median(walls[key{k, 64}])),
			fmt.Sprintf("%.2f", measure.Median(rates[key{c.skeleton, 64}])/measure.Median(rates[key{k, 64}])))
	}
	t.print()
	g.atLeast("64 ADDs at once, nft", measure.Median(rates[key{c.nft, 64}]), 300, "ADD/s")
	g.atMost("ADDs that failed, of those at once", float64(failed), 0, "")
	return nil
}

// burst runs the contender on n new pods at once. Making the pods, inputs and
// threads comes before the clock starts; nothing is deleted before it stops.
func burst(c *contender, n int) (all time.Duration, each []time.Duration, errs []error) {
	var jobs []*job
	defer func() {
		for _, j := range jobs {
			j.close()
			j.netns.Close()
		}
	}()
	for range n {
		pod, err := sandbox.New()
		if err != nil {
			return 0, nil, []error{err}
		}
		j, err := c.prepare(pod)
		if err != nil {
			pod.Close()
			return 0, nil, []error{err}
		}
		jobs = append(jobs, j)
	}

	var inPlace, finished sync.WaitGroup
	inPlace.Add(n)
	start := make(chan struct{})
	results := make([]measure.Cost, n)
	failures := make([]error, n)
	for i, j := range jobs {
		finished.Go(func() {
			failures[i] = j.enter(func() (err error) {
				inPlace.Done()
				<-start
				results[i], err = j.run()
				return err
			})
		})
	}
	inPlace.Wait()
	begun := time.Now()
	close(start)
	finished.Wait()
	all = time.Since(begun)
	for i, err := range failures {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", c.name, err))
		} else {
			each = append(each, results[i].Wall)
		}
	}
	return all, each, errs
}
