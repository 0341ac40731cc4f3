// Package redirect is the domain of Preroute: what a pod's redirect is, the
// ordered list of rules it means, and what those rules do to a connection.
//
// A [Policy] is parsed from the annotation preroute.io/policy and compiles, by
// [Policy.Rules], to a list of which the first match wins. Everything else
// prints, applies or explains that list: the netfilter backends program it into
// a network namespace, [Decide] answers what would happen to one connection.
//
// The package is pure: it imports the standard library only, opens nothing, and
// its functions take values and return values.
package redirect

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Version is the policy format this build reads and writes: the field "v".
const Version = 1

// MaxID is the largest UID or GID a policy may name. 4294967295 is (uid_t)-1,
// which the kernel keeps for "no ID" (chown(2), setreuid(2)).
const MaxID = 1<<32 - 2

// Mode says how a redirected packet reaches the proxy.
type Mode string

// The modes of a direction. ModeRedirect and ModeTProxy are of inbound TCP,
// ModeProxyProtocol and ModeTProxy of UDP.
const (
	ModeRedirect      Mode = "redirect"       // NAT; the proxy asks SO_ORIGINAL_DST
	ModeTProxy        Mode = "tproxy"         // no NAT; the accepted socket's own address is the original destination
	ModeProxyProtocol Mode = "proxy-protocol" // a PROXY protocol v2 header in front of each datagram
)

// Policy is one pod's redirect, complete. The zero Policy redirects nothing.
// Its JSON form is the value of the annotation preroute.io/policy.
type Policy struct {
	V                int      `json:"v"`
	Proxy            Proxy    `json:"proxy,omitzero"`
	Inbound          Inbound  `json:"inbound,omitzero"`
	Outbound         Outbound `json:"outbound,omitzero"`
	UDP              UDP      `json:"udp,omitzero"`
	DNS              DNS      `json:"dns,omitzero"`
	ExceptInterfaces []string `json:"exceptInterfaces,omitempty"` // left alone in either direction
}

// Proxy says whose sockets are the proxy's own: those whose owner has one of
// the UIDs or one of the (primary) GIDs.
type Proxy struct {
	UIDs    []uint32 `json:"uids,omitempty"`
	GIDs    []uint32 `json:"gids,omitempty"`
	Hairpin bool     `json:"hairpin,omitempty"` // the proxy's connections to the pod's own addresses go to the inbound port
}

// Inbound is what happens to TCP connections from outside to the pod.
type Inbound struct {
	Port          uint16 `json:"port"`            // 0: left alone
	Mode          Mode   `json:"mode,omitempty"`  // ModeRedirect (also when empty) or ModeTProxy
	Ports         Ports  `json:"ports,omitempty"` // empty: all
	ExceptPorts   Ports  `json:"exceptPorts,omitempty"`
	ExceptSources Nets   `json:"exceptSources,omitempty"`
}

// Outbound is what happens to TCP connections of the app to outside the pod.
type Outbound struct {
	Port        uint16   `json:"port"`            // 0: left alone
	Ports       Ports    `json:"ports,omitempty"` // empty: all
	ExceptPorts Ports    `json:"exceptPorts,omitempty"`
	Nets        Nets     `json:"nets,omitempty"` // empty: all
	ExceptNets  Nets     `json:"exceptNets,omitempty"`
	ExceptUIDs  []uint32 `json:"exceptUIDs,omitempty"`
}

// UDP is what happens to datagrams, under the exceptions of Inbound and Outbound.
type UDP struct {
	Mode         Mode   `json:"mode,omitempty"` // ModeProxyProtocol (also when empty) or ModeTProxy
	InboundPort  uint16 `json:"inboundPort"`    // 0: left alone
	OutboundPort uint16 `json:"outboundPort"`   // 0: left alone
}

// DNS is what happens to the app's queries to port 53, over UDP and TCP.
type DNS struct {
	Port uint16 `json:"port"` // 0: left alone
}

// PortRange is the ports First to Last, both included. 1 <= First <= Last.
type PortRange struct{ First, Last uint16 }

// Ports is a set of ports: ranges in ascending order that neither overlap nor touch.
type Ports []PortRange

// Nets is a set of IPv4 and IPv6 networks: masked, in ascending order, none
// inside another.
type Nets []netip.Prefix

// IsZero reports whether the policy redirects nothing.
func (p *Policy) IsZero() bool {
	return p.Inbound.Port == 0 && p.Outbound.Port == 0 && p.DNS.Port == 0 &&
		p.UDP.InboundPort == 0 && p.UDP.OutboundPort == 0
}

// String prints the policy as JSON that [Parse] reads back to an equal policy.
func (p *Policy) String() string {
	b, err := json.Marshal(p)
	if err != nil {
		return err.Error() // cannot happen: every field marshals
	}
	return string(b)
}

// Equal reports whether p and q are the same redirect.
func (p *Policy) Equal(q *Policy) bool { return p.String() == q.String() }

// Contains reports whether port is in the set.
func (ps Ports) Contains(port uint16) bool {
	_, ok := slices.BinarySearchFunc(ps, port, func(r PortRange, port uint16) int {
		switch {
		case r.Last < port:
			return -1
		case r.First > port:
			return 1
		}
		return 0
	})
	return ok
}

// String prints the range as in a policy: "80" or "9000-9100".
func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// String prints the set as in a policy: "80,443,9000-9100".
func (ps Ports) String() string {
	items := make([]string, len(ps))
	for i, r := range ps {
		items[i] = r.String()
	}
	return strings.Join(items, ",")
}

// MarshalText prints the set as in a policy.
func (ps Ports) MarshalText() ([]byte, error) { return []byte(ps.String()), nil }

// Contains reports whether a is in one of the networks.
func (ns Nets) Contains(a netip.Addr) bool {
	return slices.ContainsFunc(ns, func(n netip.Prefix) bool { return n.Contains(a) })
}

// Family returns the networks of one family.
func (ns Nets) Family(is4 bool) Nets {
	var out Nets
	for _, n := range ns {
		if n.Addr().Is4() == is4 {
			out = append(out, n)
		}
	}
	return out
}

// String prints the networks separated by commas.
func (ns Nets) String() string {
	items := make([]string, len(ns))
	for i, n := range ns {
		items[i] = n.String()
	}
	return strings.Join(items, ",")
}
