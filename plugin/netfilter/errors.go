// Package netfilter programs a policy's rules into a network namespace, as an
// nftables table over netlink (nft.go) or through iptables-restore
// (iptables.go).
//
// Its limits: it needs CAP_NET_ADMIN over the namespace; what it programs lives
// and dies with the namespace; UDP other than DNS is not redirected here.
package netfilter

import (
	"fmt"

	"github.com/preroute/preroute/plugin/redirect"
)

// CurrentNetNS, in the place of a file descriptor, stands for the network
// namespace of the calling process. Entering it would need CAP_SYS_ADMIN, which
// an init container need not have.
const CurrentNetNS = 0

// Unsupported says that this kernel or this machine lacks something.
type Unsupported struct {
	What string // what was asked for, and what is missing for it
	Need string // what would serve: "Linux 5.2 with CONFIG_NFT_FIB_INET"
	Err  error  // what the kernel or the program said; may be nil
}

func (e *Unsupported) Error() string {
	s := fmt.Sprintf("%s; this needs %s", e.What, e.Need)
	if e.Err != nil {
		s += fmt.Sprintf(" (%v)", e.Err)
	}
	return s
}

func (e *Unsupported) Unwrap() error { return e.Err }

// Difference is the first thing in which a namespace is not as the policy says.
type Difference struct {
	Where string // "nft table inet preroute, chain output, rule 3"
	Want  string // "" when it should not be there
	Have  string // "" when it is missing
}

func (d *Difference) Error() string {
	switch {
	case d.Have == "":
		return fmt.Sprintf("%s: missing: %s", d.Where, d.Want)
	case d.Want == "":
		return fmt.Sprintf("%s: not of this policy: %s", d.Where, d.Have)
	}
	return fmt.Sprintf("%s: want: %s; have: %s", d.Where, d.Want, d.Have)
}

// Supported returns an *Unsupported for what a policy asks that no backend of
// this build does.
func Supported(p *redirect.Policy) error {
	if p.UDP.InboundPort != 0 || p.UDP.OutboundPort != 0 {
		return &Unsupported{
			What: "udp: this build redirects TCP and DNS only, and would let UDP pass around the proxy",
			Need: "a build with the eBPF data path, or a policy without udp",
		}
	}
	return nil
}
