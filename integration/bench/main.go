// Program bench measures what Preroute costs: a pod's ADD beside a bare CNI
// plugin and beside iptables, and the pod's traffic through each backend
// beside no redirect. Everything that is compared runs in turns within one
// run, so a busy machine moves the milliseconds and leaves the ratios. Needs
// root; all of it happens in namespaces of its own (see package sandbox).
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

func main() { os.Exit(run()) }

func run() int {
	bin := flag.String("bin", "bin", "where the built programs are")
	quick := flag.Bool("quick", false, "a fifth of the rounds: rough figures within a minute")
	only := flag.String("only", "", "one part: add, parallel or traffic")
	peak := flag.String("peak", "", "for the benchmark itself: run this program and print its peak memory")
	flag.Parse()
	if *peak != "" {
		return printPeak(*peak)
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "bench: making network namespaces needs root; run: sudo make bench")
		return 1
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := bench(ctx, *bin, *only, *quick); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

func bench(ctx context.Context, bin, only string, quick bool) error {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return err
	}
	scale := 5
	if quick {
		scale = 1
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err
	}
	fmt.Printf("Linux %s, %d CPUs, load %s before the run. Medians; ratios within the run.\n",
		unix.ByteSliceToString(uts.Release[:]), runtime.NumCPU(), strings.Fields(string(load))[0])

	c, err := newContenders(bin)
	if err != nil {
		return err
	}
	var g goals
	for _, part := range []struct {
		name string
		run  func(context.Context, *contenders, *goals, int) error
	}{{"add", benchAdd}, {"parallel", benchParallel}, {"traffic", benchTraffic}} {
		if only != "" && only != part.name {
			continue
		}
		if err := part.run(ctx, c, &g, scale); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	return g.print(filepath.Join(bin, "preroute"))
}
