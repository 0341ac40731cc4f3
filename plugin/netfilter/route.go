package netfilter

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"syscall"

	"github.com/preroute/preroute/plugin/redirect"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// What a namespace needs beside its netfilter rules:
//
//   - With inbound.mode tproxy the proxy may dial the app from the client's
//     address. The app's answer to that address would leave by eth0, so the rules
//     mark it (markToLo) and policy routing brings a marked packet back to lo.
//   - With proxy.hairpin the proxy dials the app from 127.0.0.6 or ::6. The first
//     is an address of every lo, the second has to be added.
//
// Neither has an effect without the rules, so it is made before them and taken
// away after them: a process killed in between leaves the pod as it was.
const (
	// markToLo is the bit of the packet's and the connection's mark that says
	// "the client's address is held by the proxy, in this pod".
	markToLo = 0x2000000
	// markToInbound is the bit of the packet's mark by which the output hook asks
	// the prerouting hook, on lo, to take a packet to the inbound chain (tproxy).
	markToInbound = 0x1000000
	// routeID is the number of our routing table, of our rule's priority, and of
	// the conntrack zone of captured DNS queries: "pr" in ASCII.
	routeID = 0x7072
)

// routeNeeds is what of it a policy needs.
type routeNeeds struct{ toLo, passthrough bool }

func needsOf(p *redirect.Policy) routeNeeds {
	return routeNeeds{
		toLo:        p.Inbound.Port != 0 && p.Inbound.Mode == redirect.ModeTProxy,
		passthrough: p.Inbound.Port != 0 && p.Proxy.Hairpin,
	}
}

// One thing that is there or not: a rule, a route, an address.
type item struct {
	what   string // as ip(8) writes it
	family int
	add    func(*netlink.Handle) error
	del    func(*netlink.Handle) error
	exists func(*netlink.Handle) (bool, error)
}

var families = []struct {
	id   int
	flag string
	all  net.IPNet
}{
	{unix.AF_INET, "-4", net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}},
	{unix.AF_INET6, "-6", net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}},
}

// loIndex is the index of lo, the first device of every network namespace.
const loIndex = 1

var loDevice = &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "lo", Index: loIndex}}

// toLoItems starts each family with its rule, which without its route does
// nothing, so that the rule tells of everything (strayRoutes).
func toLoItems() []item {
	var items []item
	for _, f := range families {
		mask := uint32(markToLo)
		rule := netlink.NewRule()
		rule.Family, rule.Priority, rule.Table = f.id, routeID, routeID
		rule.Mark, rule.Mask = markToLo, &mask
		route := &netlink.Route{
			Family: f.id, LinkIndex: loIndex, Dst: &f.all, Table: routeID,
			Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST,
		}
		items = append(items,
			item{
				family: f.id,
				what:   fmt.Sprintf("ip %s rule pref %d fwmark %#x/%#x lookup %d", f.flag, routeID, markToLo, markToLo, routeID),
				add:    func(h *netlink.Handle) error { return h.RuleAdd(rule) },
				del:    func(h *netlink.Handle) error { return h.RuleDel(rule) },
				exists: func(h *netlink.Handle) (bool, error) { return ruleExists(h, rule) },
			},
			item{
				family: f.id,
				what:   fmt.Sprintf("ip %s route local default dev lo table %d", f.flag, routeID),
				add:    func(h *netlink.Handle) error { return h.RouteAdd(route) },
				del:    func(h *netlink.Handle) error { return h.RouteDel(route) },
				exists: func(h *netlink.Handle) (bool, error) { return routeExists(h, route) },
			})
	}
	return items
}

func routeExists(h *netlink.Handle, want *netlink.Route) (bool, error) {
	routes, err := h.RouteListFiltered(want.Family, &netlink.Route{Table: want.Table, Type: want.Type}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
	return slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.LinkIndex == want.LinkIndex }), err
}

func ruleExists(h *netlink.Handle, want *netlink.Rule) (bool, error) {
	rules, err := h.RuleList(want.Family)
	return slices.ContainsFunc(rules, func(r netlink.Rule) bool {
		return r.Priority == want.Priority && r.Table == want.Table && r.Mark == want.Mark && r.Mask != nil && *r.Mask == *want.Mask
	}), err
}

func passthroughItem() item {
	// Without duplicate address detection: a proxy may bind to it at once.
	addr := &netlink.Addr{Flags: unix.IFA_F_NODAD, IPNet: &net.IPNet{IP: net.ParseIP("::6"), Mask: net.CIDRMask(128, 128)}}
	return item{
		family: unix.AF_INET6,
		what:   "ip -6 address ::6/128 dev lo",
		add:    func(h *netlink.Handle) error { return h.AddrAdd(loDevice, addr) },
		del:    func(h *netlink.Handle) error { return h.AddrDel(loDevice, addr) },
		exists: func(h *netlink.Handle) (bool, error) {
			addrs, err := h.AddrList(loDevice, unix.AF_INET6)
			return slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.IP.Equal(addr.IP) }), err
		},
	}
}

// itemsOf splits everything of ours into what the policy needs and the rest.
func itemsOf(p *redirect.Policy) (needed, rest []item) {
	n := needsOf(p)
	sort := func(need bool, items ...item) {
		if need {
			needed = append(needed, items...)
		} else {
			rest = append(rest, items...)
		}
	}
	sort(n.toLo, toLoItems()...)
	sort(n.passthrough, passthroughItem())
	return needed, rest
}

// noIPv6 is what the kernel answers where IPv6 is compiled out or disabled; a
// pod without IPv6 needs no IPv6 routes.
func noIPv6(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EACCES)
}

// ipv6Disabled reports whether IPv6 is switched off in the namespace
// (net.ipv6.conf.lo.disable_ipv6): its lo, which is up whenever something of ours
// could be added, then has no ::1.
func ipv6Disabled(h *netlink.Handle) bool {
	addrs, err := h.AddrList(loDevice, unix.AF_INET6)
	return err == nil && !slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.IP.Equal(net.IPv6loopback) })
}

func routeHandle(ns int) (*netlink.Handle, error) {
	at := netns.NsHandle(ns)
	if ns == CurrentNetNS {
		at = netns.None()
	}
	h, err := netlink.NewHandleAt(at, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening a route socket in the pod's network namespace: %w", err)
	}
	return h, nil
}

// addRoutes makes what the policy needs and is not there. The undo function
// takes away what this call made.
func addRoutes(ns int, p *redirect.Policy) (changed bool, undo func(), err error) {
	undo = func() {}
	if needsOf(p) == (routeNeeds{}) {
		return false, undo, nil
	}
	h, err := routeHandle(ns)
	if err != nil {
		return false, undo, err
	}
	defer h.Close()
	needed, _ := itemsOf(p)
	var made []item
	undo = func() {
		h, err := routeHandle(ns)
		if err != nil {
			return // best effort on the way out of another error; without rules it has no effect
		}
		defer h.Close()
		for _, it := range slices.Backward(made) {
			_ = it.del(h)
		}
	}
	for _, it := range needed {
		err := it.add(h)
		if errors.Is(err, unix.ENETDOWN) { // lo is still down: runtimes differ in when they raise it
			if err = h.LinkSetUp(loDevice); err == nil {
				err = it.add(h)
			}
		}
		switch {
		case err == nil:
			made = append(made, it)
		case errors.Is(err, unix.EEXIST) || noIPv6(err):
		default:
			undo()
			return false, func() {}, fmt.Errorf("adding %s: %w", it.what, err)
		}
	}
	return len(made) > 0, undo, nil
}

// removeUnneeded takes away what of ours policy p does not need.
func removeUnneeded(ns int, p *redirect.Policy) (changed bool, err error) {
	h, err := routeHandle(ns)
	if err != nil {
		return false, err
	}
	defer h.Close()
	_, rest := itemsOf(p)
	for _, it := range slices.Backward(rest) {
		there, err := it.exists(h)
		if err != nil && !noIPv6(err) {
			return changed, fmt.Errorf("looking for %s: %w", it.what, err)
		}
		if !there {
			continue
		}
		if err := it.del(h); err != nil {
			return changed, fmt.Errorf("removing %s: %w", it.what, err)
		}
		changed = true
	}
	return changed, nil
}

// strayRoutes reports, cheaper than removeUnneeded can, whether it is worth a
// call: on the path of every pod's start, where there is next to never anything.
func strayRoutes(ns int, p *redirect.Policy) (stray bool) {
	n := needsOf(p)
	holds := func(msg, family int, b []byte) bool {
		rib, err := syscall.NetlinkRIB(msg, family)
		return err != nil || bytes.Contains(rib, b) // when in doubt, look closer
	}
	_, err := socketIn(ns, func() (int, error) {
		// The priority of our rule, and the address ::6, as attributes.
		priority := binary.NativeEndian.AppendUint32([]byte{8, 0, unix.FRA_PRIORITY, 0}, routeID)
		six := append([]byte{20, 0, unix.IFA_ADDRESS, 0}, net.ParseIP("::6")...)
		stray = !n.toLo && (holds(unix.RTM_GETRULE, unix.AF_INET, priority) || holds(unix.RTM_GETRULE, unix.AF_INET6, priority)) ||
			!n.passthrough && holds(unix.RTM_GETADDR, unix.AF_INET6, six)
		return -1, nil
	})
	return stray || err != nil
}

// checkRoutes returns nil, or a *Difference for the first route, rule or
// address that policy p needs and the namespace lacks, or has and should not.
func checkRoutes(ns int, p *redirect.Policy) error {
	h, err := routeHandle(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	needed, rest := itemsOf(p)
	for i, it := range slices.Concat(needed, rest) {
		there, err := it.exists(h)
		switch {
		case err != nil && noIPv6(err):
		case err != nil:
			return fmt.Errorf("looking for %s: %w", it.what, err)
		case i < len(needed) && !there && it.family == unix.AF_INET6 && ipv6Disabled(h):
		case i < len(needed) && !there:
			return &Difference{Where: "routing", Want: it.what}
		case i >= len(needed) && there:
			return &Difference{Where: "routing", Have: it.what}
		}
	}
	return nil
}
