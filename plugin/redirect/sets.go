package redirect

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// ParsePorts reads a set of ports: "80,443,9000-9100", blanks around items
// allowed, "" the empty set.
func ParsePorts(s string) (Ports, error) {
	if strings.Trim(s, " \t") == "" {
		return nil, nil
	}
	var ps Ports
	for item := range strings.SplitSeq(s, ",") {
		item = strings.Trim(item, " \t")
		first, last, isRange := strings.Cut(item, "-")
		if !isRange {
			last = first
		}
		a, okA := parsePort(first)
		b, okB := parsePort(last)
		switch {
		case !okA || !okB:
			return nil, fmt.Errorf("item %s: want a port from 1 to 65535 or a range such as 9000-9100", short(strconv.Quote(item)))
		case a > b:
			return nil, fmt.Errorf("item %q: the range is reversed; write %d-%d", item, b, a)
		}
		ps = append(ps, PortRange{a, b})
	}
	return normalPorts(ps), nil
}

func parsePort(s string) (uint16, bool) {
	if len(s) == 0 || len(s) > 5 || s[0] == '0' || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil
}

func normalPorts(ps Ports) Ports {
	slices.SortFunc(ps, func(a, b PortRange) int {
		return cmp.Or(cmp.Compare(a.First, b.First), cmp.Compare(a.Last, b.Last))
	})
	out := ps[:0]
	for _, r := range ps {
		if k := len(out) - 1; k >= 0 && int(r.First) <= int(out[k].Last)+1 {
			out[k].Last = max(out[k].Last, r.Last)
			continue
		}
		out = append(out, r)
	}
	return out
}

// ParseCIDR reads one network, blanks around it allowed; bits behind the prefix
// are dropped, as in 10.1.2.3/8.
func ParseCIDR(s string) (netip.Prefix, error) {
	s = strings.TrimSpace(s)
	p, err := netip.ParsePrefix(s)
	if err != nil {
		if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
			a = a.Unmap()
			return netip.Prefix{}, fmt.Errorf("want a CIDR; write %s/%d", a, a.BitLen())
		}
		return netip.Prefix{}, errors.New("want a CIDR such as 10.0.0.0/8 or fd00::/8")
	}
	if p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("IPv4 in IPv6 notation never matches a packet; write an IPv4 CIDR of %s", p.Addr().Unmap())
	}
	return p.Masked(), nil
}

func normalNets(ns Nets) Nets {
	order := func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return cmp.Compare(a.Bits(), b.Bits())
	}
	slices.SortFunc(ns, order)
	out := ns[:0]
	for _, n := range ns {
		// Sorted by address, then wider first: what contains n is the last one kept.
		if k := len(out) - 1; k >= 0 && out[k].Overlaps(n) {
			continue
		}
		out = append(out, n)
	}
	return out
}
