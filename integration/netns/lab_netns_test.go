package netns_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// This file makes the namespaces of a pod and of its world, and the wire between.

// sweep removes the namespaces of earlier runs that were killed.
func sweep() {
	entries, _ := os.ReadDir(netnsFolder)
	for _, e := range entries {
		rest, ours := strings.CutPrefix(e.Name(), netnsPrefix)
		pid, _, _ := strings.Cut(rest, "-")
		if _, err := strconv.Atoi(pid); !ours || err != nil {
			continue
		}
		if _, err := os.Stat("/proc/" + pid); errors.Is(err, os.ErrNotExist) {
			netns.DeleteNamed(e.Name()) // the next run tries again
		}
	}
}

// onThread runs f on an operating system thread of its own, which ends with f:
// whatever namespaces f entered are left behind with it.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked
		done <- f()
	}()
	return <-done
}

// in runs f inside the namespace at path.
func in(path string, f func() error) error {
	return onThread(func() error {
		ns, err := netns.GetFromPath(path)
		if err != nil {
			return fmt.Errorf("opening %s: %w", path, err)
		}
		defer ns.Close()
		if err := unix.Setns(int(ns), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("entering %s: %w", path, err)
		}
		return f()
	})
}

func makeNetns(name string) error {
	return onThread(func() error {
		ns, err := netns.NewNamed(name)
		if err != nil {
			return err
		}
		defer ns.Close()
		for file, value := range map[string]string{
			// Agents without privileges serve ports such as 53 and 80.
			"ipv4/ip_unprivileged_port_start": "0",
			// Duplicate address detection holds link-local addresses back for a
			// second, and with them the neighbour discovery of all others.
			"ipv6/conf/all/accept_dad":     "0",
			"ipv6/conf/default/accept_dad": "0",
		} {
			if err := os.WriteFile("/proc/sys/net/"+file, []byte(value), 0); err != nil {
				return err
			}
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
}

func (p *pod) wire() error {
	if p.noIPv6 {
		p.sysctl("net/ipv6/conf/all/disable_ipv6", "1")
		p.sysctl("net/ipv6/conf/default/disable_ipv6", "1")
	}
	if err := p.veth(p.ifName, worldEnd[false], podIPv4, podIPv6, gwIPv4, gwIPv6); err != nil {
		return err
	}
	if p.second != "" {
		if err := p.veth(p.second, worldEnd[true], secondIPv4, secondIPv6, secondGwIPv4, secondGwIPv6); err != nil {
			return err
		}
	}
	err := in(p.path, func() error {
		for _, r := range [][2]string{{"0.0.0.0/0", gwIPv4.Addr().String()}, {"::/0", gwIPv6.Addr().String()}} {
			if err := p.route(r[0], r[1]); err != nil {
				return err
			}
		}
		if p.second == "" {
			return nil
		}
		return errors.Join(
			p.route("203.0.113.0/24", secondGwIPv4.Addr().String()),
			p.route("2001:db8:2::/48", secondGwIPv6.Addr().String()))
	})
	if err != nil {
		return err
	}
	return in(p.world, func() error {
		// IPv6 answers and binds from an address of a local route only with this.
		if err := os.WriteFile("/proc/sys/net/ipv6/ip_nonlocal_bind", []byte("1"), 0); err != nil {
			return err
		}
		// Clients keep out of the pod's range of ports: a proxy that dials the app
		// from a client's address must not happen on the port of another connection
		// of that client, since the app could not tell the two apart.
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("20000 29999"), 0); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, n := range worldNets {
			_, dst, err := net.ParseCIDR(n)
			if err != nil {
				return err
			}
			// A local route is what makes every address of a network the host's own.
			r := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: dst, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST}
			if err := netlink.RouteAdd(r); err != nil {
				return fmt.Errorf("adding the local route %s: %w", n, err)
			}
		}
		return nil
	})
}

// route adds a route inside the pod's namespace; none for IPv6 in a pod that
// has it off.
func (p *pod) route(to, via string) error {
	ip, dst, err := net.ParseCIDR(to)
	if err != nil || (p.noIPv6 && ip.To4() == nil) {
		return err
	}
	if err := netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP(via)}); err != nil {
		return fmt.Errorf("adding the route %s via %s: %w", to, via, err)
	}
	return nil
}

func (p *pod) veth(inPod, inWorld string, pod4, pod6, world4, world6 netip.Prefix) error {
	worldNS, err := netns.GetFromPath(p.world)
	if err != nil {
		return err
	}
	defer worldNS.Close()
	addrs := []netip.Prefix{pod4, pod6}
	if p.noIPv6 {
		addrs = addrs[:1]
	}
	macs := map[string]net.HardwareAddr{}
	err = in(p.path, func() error {
		link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: inPod}, PeerName: inWorld, PeerNamespace: netlink.NsFd(worldNS)}
		if err := netlink.LinkAdd(link); err != nil {
			return fmt.Errorf("adding the veth %s: %w", inPod, err)
		}
		macs[inPod], err = up(inPod, addrs...)
		return err
	})
	if err != nil {
		return err
	}
	if inPod == p.ifName {
		p.mac = macs[inPod].String()
	}
	err = in(p.world, func() error {
		if macs[inWorld], err = up(inWorld, world4, world6); err != nil {
			return err
		}
		return know(inWorld, macs[inPod], pod4, pod6)
	})
	if err != nil {
		return err
	}
	gateways := []netip.Prefix{world4, world6}[:len(addrs)]
	return in(p.path, func() error { return know(inPod, macs[inWorld], gateways...) })
}

// up gives a link its addresses and sets it up.
func up(ifName string, addrs ...netip.Prefix) (mac net.HardwareAddr, err error) {
	l, err := netlink.LinkByName(ifName)
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a.String())
		if err != nil {
			return nil, err
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(l, addr); err != nil {
			return nil, fmt.Errorf("adding %s to %s: %w", a, ifName, err)
		}
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return nil, fmt.Errorf("setting %s up: %w", ifName, err)
	}
	return l.Attrs().HardwareAddr, nil
}

// know enters neighbours for good: the kernel looks for IPv6 neighbours only
// when it has noticed that the link is up, which takes it up to a second.
func know(ifName string, mac net.HardwareAddr, addrs ...netip.Prefix) error {
	l, err := netlink.LinkByName(ifName)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		n := &netlink.Neigh{LinkIndex: l.Attrs().Index, State: netlink.NUD_PERMANENT, IP: a.Addr().AsSlice(), HardwareAddr: mac}
		if err := netlink.NeighSet(n); err != nil {
			return fmt.Errorf("adding the neighbour %s on %s: %w", a.Addr(), ifName, err)
		}
	}
	return nil
}

// addAddress gives the pod one more address on an interface.
func (p *pod) addAddress(ifName string, a netip.Prefix) {
	p.t.Helper()
	var mac net.HardwareAddr
	err := in(p.path, func() (err error) {
		mac, err = up(ifName, a)
		return err
	})
	if err == nil {
		err = in(p.world, func() error { return know(worldEnd[ifName == p.second], mac, a) })
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// enableIPv6 gives IPv6 to a pod that was made without.
func (p *pod) enableIPv6() {
	p.t.Helper()
	p.sysctl("net/ipv6/conf/all/disable_ipv6", "0")
	p.sysctl("net/ipv6/conf/default/disable_ipv6", "0")
	p.noIPv6 = false
	p.addAddress(p.ifName, podIPv6)
	err := in(p.path, func() error { return p.route("::/0", gwIPv6.Addr().String()) })
	if err != nil {
		p.t.Fatal(err)
	}
}

// sysctl writes a file below /proc/sys of the pod's namespace.
func (p *pod) sysctl(file, value string) {
	p.t.Helper()
	err := in(p.path, func() error { return os.WriteFile("/proc/sys/"+file, []byte(value), 0) })
	if err != nil {
		p.t.Fatal(err)
	}
}

// enableIPv6WithAlias is enableIPv6 with the second address that the row tables
// call alias.
func (p *pod) enableIPv6WithAlias() {
	p.t.Helper()
	p.enableIPv6()
	p.addAddress(p.ifName, netip.MustParsePrefix("fd00:77::200/64"))
}
