package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/preroute/preroute/integration/measure"
	"github.com/preroute/preroute/integration/sandbox"
)

// A link is a pod and its peer, joined by a veth pair, with the same listener
// on the proxy's two ports in each.
type link struct {
	name       string
	pod, world *sandbox.Netns
	redirected bool
	sockets    []int // that listen
}

// A way is one direction: who dials what. Without a redirect the client dials
// the very listener that it else is redirected to, so that the packets take
// the same path and the difference is the redirect.
type way struct {
	name           string
	client         func(*link) *sandbox.Netns
	direct, target string
}

var ways = []way{
	{"outbound", func(l *link) *sandbox.Netns { return l.pod }, "127.0.0.1:8900", "10.88.0.1:80"},
	{"outbound IPv6", func(l *link) *sandbox.Netns { return l.pod }, "[::1]:8900", "[fd88::1]:80"},
	{"inbound", func(l *link) *sandbox.Netns { return l.world }, "10.88.0.2:8901", "10.88.0.2:8080"},
	{"inbound IPv6", func(l *link) *sandbox.Netns { return l.world }, "[fd88::2]:8901", "[fd88::2]:8080"},
}

// Figures of one round.
type figures struct {
	perSecond          float64 // connections with one request each
	connected, request time.Duration
	throughput         float64 // bytes a second
}

func benchTraffic(ctx context.Context, c *contenders, _ *goals, scale int) error {
	var links []*link
	defer func() {
		for _, l := range links {
			l.close()
		}
	}()
	for _, k := range []struct {
		name string
		c    *contender
	}{{"no redirect", nil}, {"nft", c.nft}, {"iptables", c.iptables}} {
		l, err := newLink(k.name, k.c)
		if err != nil {
			return fmt.Errorf("%s: %w", k.name, err)
		}
		links = append(links, l)
	}
	rounds := 3 + 6*scale
	got := map[string][]figures{}
	for range rounds {
		for _, w := range ways {
			for _, i := range rand.Perm(len(links)) {
				if err := ctx.Err(); err != nil {
					return err
				}
				l := links[i]
				f, err := l.measure(w)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", l.name, w.name, err)
				}
				got[w.name+l.name] = append(got[w.name+l.name], f)
			}
		}
	}
	t := newTable(fmt.Sprintf("Traffic, client and server on one CPU (rounds: %d)", rounds), "",
		"connections/s", "x", "new connection p50 us", "x", "request p50 us", "x", "MB/s", "x")
	for _, w := range ways {
		base := medians(got[w.name+links[0].name])
		for _, l := range links {
			m := medians(got[w.name+l.name])
			t.row(w.name+", "+l.name,
				fmt.Sprintf("%.0f", m.perSecond), ratio(m.perSecond, base.perSecond),
				us(m.connected), ratio(m.connected, base.connected),
				us(m.request), ratio(m.request, base.request),
				fmt.Sprintf("%.0f", m.throughput/1e6), ratio(m.throughput, base.throughput))
		}
	}
	t.print()
	return nil
}

func us(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d.Nanoseconds())/1000) }

func medians(list []figures) figures {
	return figures{
		medianOf(list, func(f figures) float64 { return f.perSecond }),
		medianOf(list, func(f figures) time.Duration { return f.connected }),
		medianOf(list, func(f figures) time.Duration { return f.request }),
		medianOf(list, func(f figures) float64 { return f.throughput }),
	}
}

func medianOf[T float64 | time.Duration](list []figures, of func(figures) T) T {
	values := make([]T, len(list))
	for i, f := range list {
		values[i] = of(f)
	}
	return measure.Median(values)
}

func newLink(name string, c *contender) (l *link, err error) {
	l = &link{name: name, redirected: c != nil}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	for _, n := range []**sandbox.Netns{&l.pod, &l.world} {
		if *n, err = sandbox.New(); err != nil {
			return l, err
		}
		for sysctl, value := range map[string]string{
			"net/ipv6/conf/default/accept_dad": "0",           // addresses that can be used at once
			"net/ipv4/ip_local_port_range":     "10000 65535", // the client closes first: enough ports
		} {
			if err = (*n).Sysctl(sysctl, value); err != nil {
				return l, err
			}
		}
		if err = (*n).Do(shrinkLoopback); err != nil {
			return l, err
		}
	}
	if err = l.join(); err != nil {
		return l, err
	}
	for _, port := range []uint16{8900, 8901} {
		lns, err := l.pod.Listen(2102, port)
		if err != nil {
			return l, err
		}
		for _, ln := range lns {
			fd, err := takeSocket(ln)
			if err != nil {
				return l, err
			}
			l.sockets = append(l.sockets, fd)
			go serve(fd)
		}
	}
	if c != nil {
		_, err = c.run(l.pod)
	}
	return l, err
}

func (l *link) join() error {
	return l.world.Do(func() error {
		veth := &netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "pod"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(l.pod.Fd()),
		}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("making the veth pair: %w", err)
		}
		if err := up("pod", "10.88.0.1/24", "fd88::1/64"); err != nil {
			return err
		}
		return l.pod.Do(func() error { return up("eth0", "10.88.0.2/24", "fd88::2/64") })
	})
}

func up(name string, addrs ...string) error {
	dev, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(dev, addr); err != nil {
			return fmt.Errorf("adding %s: %w", a, err)
		}
	}
	return netlink.LinkSetUp(dev)
}

// shrinkLoopback gives lo the MTU of eth0. A redirected connection takes its
// segment size from the route it would have had, one to localhost from lo: with
// 64 KiB there the two would differ by more than the redirect.
func shrinkLoopback() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetMTU(lo, 1500)
}

func (l *link) close() {
	for _, fd := range l.sockets {
		_ = unix.Shutdown(fd, unix.SHUT_RDWR) // ends the wait in accept, which ends serve
	}
	for _, n := range []*sandbox.Netns{l.pod, l.world} {
		if n != nil {
			n.Close()
		}
	}
}
