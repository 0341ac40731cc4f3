// Package backend chooses how a policy is programmed into a network namespace.
package backend

import "github.com/preroute/preroute/plugin/redirect"

// A Backend programs policies into a network namespace, given as an open file
// descriptor of it.
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
}
