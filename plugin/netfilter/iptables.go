package netfilter

import (
	"errors"
	"fmt"
	"os"

	"github.com/preroute/preroute/plugin/redirect"
	"golang.org/x/sys/unix"
)

// IPTables programs policies by iptables-restore, one run per family, for
// kernels without nftables and for people whose tools read iptables.
//
// Its limits, which the nft backend does not have:
//
//   - It runs the machine's programs, as root of the namespace's own user
//     namespace if the policy names UIDs or GIDs.
//   - Lists of networks are walked one by one, by each new connection.
//   - The kernel replaces one table of one family at a time. Both families'
//     programs are started before either gets its rules, and finish by
//     themselves from then on. So a kill of this process leaves one family new
//     and the other old only between two writes to two pipes; a kill of
//     iptables-restore itself leaves tables new up to some point. Each table is
//     wholly old or wholly new, the pod is redirected by the old rules or the new
//     (see ruleset.restore), Check says what differs, and the next Apply ends it.
//     During an ADD it is no matter: a pod whose ADD did not end does not start.
//   - A legacy table cannot be unloaded from one namespace: where the legacy
//     flavour made it, it stays behind, empty. (Those of the nft flavour are
//     removed again, see sweep.)
//
// The flavour is that of our rules where there are any, so that there never is a
// second copy in the other one; else legacy where somebody has legacy rules
// here; else that of the machine's iptables. Nothing is asked of iptables-legacy
// to find out, since that makes legacy tables.
type IPTables struct {
	path string // where programs are looked for, as in PATH
}

// NewIPTables returns the backend "iptables".
func NewIPTables() *IPTables {
	return &IPTables{path: os.Getenv("PATH") + string(os.PathListSeparator) + systemDirs}
}

// Name is what the plugin's configuration calls it.
func (*IPTables) Name() string { return "iptables" }

// Apply leaves exactly policy p in the namespace, or what was there before and
// an error. It reports whether anything had to be changed.
func (t *IPTables) Apply(ns int, p *redirect.Policy) (changed bool, err error) {
	if err := Supported(p); err != nil {
		return false, err
	}
	err = inNamespace(ns, unix.LOCK_EX, func(lock *os.File) error {
		if err := ownersMatchIn(lock, p); err != nil {
			return err
		}
		changed, err = t.apply(ns, lock, p)
		return err
	})
	return changed, err
}

// Remove takes out everything of Preroute's, and is content when there is
// nothing.
func (t *IPTables) Remove(ns int) error {
	return inNamespace(ns, unix.LOCK_EX, func(lock *os.File) error {
		_, err := t.apply(ns, lock, &redirect.Policy{V: redirect.Version})
		return err
	})
}

// Check returns nil when exactly p is in place, else a *Difference that tells
// what differs first.
func (t *IPTables) Check(ns int, p *redirect.Policy) error {
	if err := Supported(p); err != nil {
		return err
	}
	return inNamespace(ns, unix.LOCK_SH, func(*os.File) error {
		have, err := t.look()
		if err != nil {
			return err
		}
		f, err := t.flavour(have)
		if err != nil {
			f = flavourNft // nothing of ours is there: only a name for what is missing
		}
		if d := have.difference(f, p); d != nil {
			return d
		}
		return checkRoutes(ns, p)
	})
}

// Present reports whether any rule of ours is in the namespace, in either
// flavour. It changes nothing, and runs no program where it need not.
func (t *IPTables) Present(ns int) (present bool, err error) {
	if !mayHoldIPTables(ns) {
		return false, nil
	}
	err = inNamespace(ns, 0, func(*os.File) error {
		have, err := t.look()
		present = have.ours(flavourNft) || have.ours(flavourLegacy)
		return err
	})
	return present, err
}

// place is one family in one flavour.
type place struct {
	flavour flavour
	is4     bool
}

// IPv6 first: a machine that lacks something lacks it there, and what has not
// been started need not be undone.
var bothFamilies = []bool{false, true}

// state is all that iptables shows of a namespace.
type state struct {
	rules map[place]ruleset
	nft   map[bool]nftChains // by is4
}

func (s state) ours(f flavour) bool {
	return s.rules[place{f, true}].ours() || s.rules[place{f, false}].ours()
}

// look reads the calling thread's namespace, without a trace.
func (t *IPTables) look() (state, error) {
	s := state{map[place]ruleset{}, map[bool]nftChains{}}
	for _, is4 := range bothFamilies {
		var err error
		if s.nft[is4], err = listNftChains(is4); err != nil {
			return s, err
		}
		if s.nft[is4].ours() {
			rs, err := t.save(is4, flavourNft)
			if err == nil {
				err = s.nft[is4].allIn(rs)
			}
			if err != nil {
				return s, err
			}
			s.rules[place{flavourNft, is4}] = rs
		}
		legacy, err := hasLegacyTables(is4)
		if err != nil {
			return s, err
		}
		if !legacy {
			continue
		}
		if s.rules[place{flavourLegacy, is4}], err = t.save(is4, flavourLegacy); err != nil {
			// Without the program nothing of ours was ever put there from here,
			// and a pod with somebody's legacy tables has to start all the same.
			if _, lacks := errors.AsType[*Unsupported](err); !lacks {
				return s, err
			}
		}
	}
	return s, nil
}

// flavour chooses where our rules go.
func (t *IPTables) flavour(s state) (flavour, error) {
	nft, legacy := s.ours(flavourNft), s.ours(flavourLegacy)
	if nft != legacy {
		if nft {
			return flavourNft, nil
		}
		return flavourLegacy, nil
	}
	for _, is4 := range bothFamilies {
		for _, table := range s.rules[place{flavourLegacy, is4}] {
			if table.others {
				return flavourLegacy, nil
			}
		}
	}
	return t.systemFlavour()
}

// wanted is what policy p, in flavour f, means for one place.
func wanted(p *redirect.Policy, f flavour, at place) ruleset {
	if p.IsZero() || at.flavour != f || !at.is4 && !kernelHasIPv6() {
		return ruleset{}
	}
	return compile(p, at.is4)
}

func (s state) difference(f flavour, p *redirect.Policy) *Difference {
	for _, at := range places(f) {
		family := "IPv6"
		if at.is4 {
			family = "IPv4"
		}
		where := fmt.Sprintf("iptables-%s, %s", at.flavour, family)
		if d := wanted(p, f, at).difference(s.rules[at], where); d != nil {
			return d
		}
	}
	return nil
}

// places are all places, those of flavour f first.
func places(f flavour) []place {
	other := flavourNft
	if f == flavourNft {
		other = flavourLegacy
	}
	return []place{{f, false}, {f, true}, {other, false}, {other, true}}
}

// apply makes the calling thread's namespace, ns, as policy p wants it.
func (t *IPTables) apply(ns int, lock *os.File, p *redirect.Policy) (changed bool, err error) {
	before, err := t.look()
	if err != nil {
		return false, err
	}
	f := flavourNft
	if !p.IsZero() { // else every flavour is to be emptied, and no program need be found
		if f, err = t.flavour(before); err != nil {
			return false, err
		}
	}
	routesMade, undoRoutes, err := addRoutes(ns, p)
	if err != nil {
		return false, err
	}
	if before.difference(f, p) != nil {
		changed = true
		if err := t.write(lock, before, f, p); err != nil {
			err = errors.Join(err, t.rollBack(lock, before))
			undoRoutes()
			return false, err
		}
	}
	routesGone, err := removeUnneeded(ns, p)
	return changed || routesMade || routesGone, err
}

// write brings every place from before to what policy p wants, in flavour f:
// first there, then, where our rules are in the other flavour too, the other.
func (t *IPTables) write(lock *os.File, before state, f flavour, p *redirect.Policy) error {
	all := places(f)
	for _, at := range [][]place{all[:2], all[2:]} {
		want := map[place]ruleset{}
		for _, at := range at {
			want[at] = wanted(p, f, at)
			if f == flavourNft {
				want[at].born(before.rules[at], before.nft[at.is4])
			}
		}
		if err := t.change(lock, before, want); err != nil {
			return err
		}
	}
	return nil
}

// change brings places from what they have to what is wanted there.
func (t *IPTables) change(lock *os.File, have state, want map[place]ruleset) error {
	var jobs []job
	for _, f := range []flavour{flavourNft, flavourLegacy} {
		for _, is4 := range bothFamilies {
			at := place{f, is4}
			want, ok := want[at]
			if !ok {
				continue
			}
			jobs = append(jobs, job{is4, f, want.restore(have.rules[at])})
		}
	}
	if err := t.restore(lock, jobs...); err != nil {
		return err
	}
	for at, want := range want {
		if at.flavour == flavourNft {
			if err := sweep(at.is4, have.rules[at], want); err != nil {
				return err
			}
		}
	}
	return nil
}

// rollBack brings every place back to what it was. It looks at what is there,
// since a failed run may have written some tables and not others.
func (t *IPTables) rollBack(lock *os.File, before state) error {
	now, err := t.look()
	if err == nil {
		want := map[place]ruleset{}
		for _, at := range places(flavourNft) {
			want[at] = before.rules[at]
			if want[at] == nil {
				want[at] = ruleset{}
			}
		}
		err = t.change(lock, now, want)
	}
	if err != nil {
		return fmt.Errorf("and putting back what was there before: %w; the next attempt starts from what is left", err)
	}
	return nil
}
