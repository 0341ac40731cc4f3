// Program demo shows what Preroute does, on real traffic: two network
// namespaces, a pod and a world, joined by a real conflist through libcni, a
// small transparent proxy in the pod, and connections both ways over both
// families. Every line that it prints is checked against what was seen on the
// sockets. It needs root, changes nothing outside its own namespaces, and
// leaves nothing behind; killed outright, a directory of temporary files (see
// package sandbox for the namespaces).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

func main() { os.Exit(run()) }

func run() int {
	bin := flag.String("bin", "bin", "where the built programs are")
	backend := flag.String("backend", "auto", "the plugin's backend: auto, nft or iptables")
	runs := flag.Int("runs", 15, "timed ADDs of each kind")
	flag.Parse()
	t := newTerm(os.Stdout)

	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "demo: making network namespaces needs root; run: sudo make demo")
		return 1
	}
	// A signal ends the context, and with it everything that waits.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	if err := demo(ctx, t, *bin, *backend, *runs); err != nil {
		if ctx.Err() != nil {
			err = errors.New("interrupted; nothing is left behind")
		}
		fmt.Fprintln(os.Stderr, "demo:", err)
		return 1
	}
	if t.failed > 0 {
		return 1
	}
	return 0
}

func demo(ctx context.Context, t *term, bin, backend string, runs int) (err error) {
	bin, err = filepath.Abs(bin)
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "preroute-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)

	t.title("Preroute: a pod's traffic reaches its sidecar, from the first packet")
	w, err := newWorld()
	if err != nil {
		return fmt.Errorf("making the world: %w", err)
	}
	defer w.close()
	rt, err := newRuntime(bin, tmp, backend, w.netns)
	if err != nil {
		return fmt.Errorf("setting up the runtime: %w", err)
	}

	meshed, err := rt.addPod(ctx, "meshed", demoPolicy)
	if err != nil {
		return fmt.Errorf("adding the pod: %w", err)
	}
	defer meshed.close()
	plain, err := rt.addPod(ctx, "plain", "")
	if err != nil {
		return fmt.Errorf("adding the pod without a policy: %w", err)
	}
	defer plain.close()
	proxy, err := startSidecar(ctx, filepath.Join(bin, "sidecar"), meshed.netns, w.addr(4, 53))
	if err != nil {
		return fmt.Errorf("starting the sidecar: %w", err)
	}
	defer proxy.stop()
	for _, p := range []*pod{meshed, plain} {
		if err := p.startApp(); err != nil {
			return fmt.Errorf("starting the app: %w", err)
		}
	}
	t.fact("pod", "%s  the app is uid %d, the proxy uid %d", meshed.addrs(), appUID, proxyUID)
	t.fact("world", "%s  joined by ptp, host-local and preroute, through libcni", w.addrs())
	t.fact("policy", "%s", strings.Replace(demoPolicy, `"outbound"`, "\n          \"outbound\"", 1))

	d := &scene{ctx: ctx, t: t, w: w, pod: meshed, proxy: proxy}
	t.title("What happens to each connection, over IPv4 and IPv6, and by which rule")
	if err := d.traffic(); err != nil {
		return err
	}
	t.title("Pods that are not the sidecar's")
	d.unmeshed(plain)
	d.refused(rt)
	t.title("What an ADD costs")
	if err := timing(ctx, t, rt, bin, backend, runs); err != nil {
		return err
	}
	t.title("What the tools say")
	d.tools(rt, bin, tmp)
	d.leave(rt, meshed, plain)
	t.summary()
	return ctx.Err()
}
