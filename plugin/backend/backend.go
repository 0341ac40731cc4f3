// Package backend chooses how a policy is programmed into a network namespace,
// and sees to it that only one backend's rules are there.
package backend

import (
	"errors"
	"fmt"

	"github.com/preroute/preroute/plugin/netfilter"
	"github.com/preroute/preroute/plugin/redirect"
)

// A Backend programs policies into a network namespace, given as an open file
// descriptor of it; 0 stands for the namespace of the calling process.
type Backend interface {
	// Name is what the plugin's configuration calls it.
	Name() string
	// Apply leaves exactly policy p in the namespace, or what was there before
	// and an error. It reports whether anything had to be changed.
	Apply(netns int, p *redirect.Policy) (changed bool, err error)
	// Check returns nil when exactly p is in place, else a
	// *netfilter.Difference that tells what differs first.
	Check(netns int, p *redirect.Policy) error
	// Remove takes out everything of Preroute's, and is content when there is
	// nothing.
	Remove(netns int) error
	// Present reports whether rules of this backend are in the namespace. It is
	// on the path of every pod's start, and runs no program where there are none.
	Present(netns int) (bool, error)
}

// A Choice is a backend and why it is this one.
type Choice struct {
	Backend
	Reason string // "" when the configuration names the backend, or auto had no need to fall back
	other  Backend
	auto   bool
}

// Choose returns the backend that a configuration names; "" is "auto".
func Choose(name string) (*Choice, error) {
	nft, ipt := netfilter.NFT{}, netfilter.NewIPTables()
	switch name {
	case "", "auto":
		return &Choice{Backend: nft, other: ipt, auto: true}, nil
	case "nft":
		return &Choice{Backend: nft, other: ipt}, nil
	case "iptables":
		return &Choice{Backend: ipt, other: nft}, nil
	}
	return nil, fmt.Errorf("backend: %q: want auto, nft or iptables", name)
}

// fallBack changes an automatic choice after err, if err says that the kernel
// lacks what the first choice needs.
func (c *Choice) fallBack(err error) bool {
	var lack *netfilter.Unsupported
	if !c.auto || !errors.As(err, &lack) {
		return false
	}
	c.swap(lack.Error())
	return true
}

func (c *Choice) swap(reason string) {
	c.auto = false
	c.Backend, c.other = c.other, c.Backend
	c.Reason = reason
}

// leftover reports whether the other backend's rules are in the namespace. What
// cannot be seen cannot be removed either.
func (c *Choice) leftover(netns int) bool {
	there, err := c.other.Present(netns)
	return err == nil && there
}

// Apply leaves exactly policy p in the namespace, whichever backend was used
// there before. An automatic choice keeps to the one that has p in place.
func (c *Choice) Apply(netns int, p *redirect.Policy) (changed bool, err error) {
	if err := netfilter.Supported(p); err != nil {
		return false, err
	}
	left := c.leftover(netns)
	if left && c.auto && c.other.Check(netns, p) == nil {
		c.swap("its rules are in place")
		return false, nil
	}
	changed, err = c.Backend.Apply(netns, p)
	if err != nil {
		if !c.fallBack(err) {
			return changed, err
		}
		changed, second := c.Backend.Apply(netns, p)
		if second != nil {
			return changed, fmt.Errorf("%w; and instead of it: %w", err, second)
		}
		return changed, nil
	}
	if !left {
		return changed, nil
	}
	// The new rules are in place; until here the old ones redirected as before.
	if err := c.other.Remove(netns); err != nil {
		return true, fmt.Errorf("removing the rules of the %s backend: %w", c.other.Name(), err)
	}
	return true, nil
}

// Check returns nil when exactly p is in place, else what differs first. An
// automatic choice looks at the backend whose rules are there.
func (c *Choice) Check(netns int, p *redirect.Policy) error {
	if err := netfilter.Supported(p); err != nil {
		return err
	}
	left := c.leftover(netns)
	if left && c.auto {
		if first, err := c.Backend.Present(netns); err == nil && !first {
			c.swap("its rules are there")
			left = false
		}
	}
	err := c.Backend.Check(netns, p)
	if err != nil && c.fallBack(err) {
		return c.Backend.Check(netns, p)
	}
	if err == nil && left {
		return &netfilter.Difference{Where: "backend", Want: c.Name() + " alone", Have: "rules of the " + c.other.Name() + " backend too"}
	}
	return err
}

// Remove takes out the rules of every backend.
func (c *Choice) Remove(netns int) error {
	err := c.Backend.Remove(netns)
	if err != nil && c.fallBack(err) {
		return c.Backend.Remove(netns)
	}
	if c.leftover(netns) {
		err = errors.Join(err, c.other.Remove(netns))
	}
	return err
}
