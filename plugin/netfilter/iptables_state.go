package netfilter

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// A ruleset is what is ours, or should be, in one family of one flavour: our
// chains and the jumps to them, by table.
type ruleset map[string]*table

type table struct {
	chains []chain
	jumps  []jump
	others bool // somebody else has a chain, a rule or a policy here
}

type chain struct {
	name  string
	rules []string // as iptables-save prints them behind "-A NAME "
}

// A jump leads from a chain that is not ours to one that is.
type jump struct {
	from, to string
	rule     string // behind "-A FROM "; holds what newBorn says
	pos      int    // counted from 1
}

// The comments of jumps in the nft flavour, where the built-in chains and their
// tables exist only once somebody needs them. They say what did not exist before
// us, so that removal leaves neither more nor less than there was.
const (
	madeChain = "preroute made this chain"
	madeTable = "preroute made this table"
	madeBoth  = "preroute made this chain and its table"
)

func newJump(from, to, made string) jump {
	rule := "-j " + to
	if made != "" {
		rule = "-m comment --comment " + quoted(made) + " " + rule
	}
	return jump{from: from, to: to, rule: rule, pos: 1}
}

func (j jump) madeChain() bool {
	return strings.Contains(j.rule, madeChain)
}

func (j jump) madeTable() bool {
	return strings.Contains(j.rule, madeTable) || strings.Contains(j.rule, madeBoth)
}

// add puts chains into a table, and a jump from a built-in chain to the first.
func (rs ruleset) add(name, builtin string, chains []chain) {
	t := rs[name]
	if t == nil {
		t = &table{}
		rs[name] = t
	}
	t.chains = append(t.chains, chains...)
	if builtin != "" {
		t.jumps = append(t.jumps, newJump(builtin, chains[0].name, ""))
	}
}

// ours reports whether anything in it is Preroute's.
func (rs ruleset) ours() bool {
	for _, t := range rs {
		if len(t.chains)+len(t.jumps) > 0 {
			return true
		}
	}
	return false
}

// get never returns nil.
func (rs ruleset) get(name string) *table {
	if t := rs[name]; t != nil {
		return t
	}
	return &table{}
}

func (t *table) chain(name string) (rules []string, ok bool) {
	for _, c := range t.chains {
		if c.name == name {
			return c.rules, true
		}
	}
	return nil, false
}

// parseSave reads what iptables-save printed.
func parseSave(text string, is4 bool) (ruleset, error) {
	rs := ruleset{}
	var t *table
	var pos map[string]int
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		switch {
		case strings.HasPrefix(line, "*"):
			t, pos = &table{}, map[string]int{}
			rs[line[1:]] = t
		case line == "" || line[0] == '#' || line == "COMMIT":
		case t == nil:
			return nil, fmt.Errorf("iptables-save printed %q outside of a table", line)
		case line[0] == ':':
			name, rest, _ := strings.Cut(line[1:], " ")
			if strings.HasPrefix(name, chainPrefix) {
				t.chains = append(t.chains, chain{name: name})
			} else if !strings.HasPrefix(rest, "ACCEPT ") {
				t.others = true // a chain of somebody's, or a policy
			}
		case strings.HasPrefix(line, "-A "):
			name, rule, _ := strings.Cut(line[3:], " ")
			t.addSaved(name, rule, is4, pos)
		default:
			return nil, fmt.Errorf("iptables-save printed %q, which is no line it is known to print", line)
		}
	}
	return rs, nil
}

func (t *table) addSaved(name, rule string, is4 bool, pos map[string]int) {
	pos[name]++
	if i := slices.IndexFunc(t.chains, func(c chain) bool { return c.name == name }); i >= 0 {
		if !is4 {
			rule = canonicalAddrs(rule)
		}
		t.chains[i].rules = append(t.chains[i].rules, rule)
		return
	}
	words := strings.Fields(rule)
	if n := len(words); n > 1 && (words[n-2] == "-j" || words[n-2] == "-g") && strings.HasPrefix(words[n-1], chainPrefix) {
		t.jumps = append(t.jumps, jump{name, words[n-1], rule, pos[name]})
		return
	}
	t.others = true
}

// canonicalAddrs writes the addresses of an IPv6 rule as Go does: iptables
// prints ::1:2 as ::0.1.0.2.
func canonicalAddrs(rule string) string {
	words := strings.Split(rule, " ")
	for i, w := range words {
		if w == "-m" || w == "-j" || w == "-g" {
			break // addresses stand in front
		}
		if w == "-s" || w == "-d" {
			if p, err := netip.ParsePrefix(words[i+1]); err == nil {
				words[i+1] = p.String()
			}
		}
	}
	return strings.Join(words, " ")
}

// difference returns the first thing in which have is not want, or nil. Where a
// jump stands and what it says of who made its chain do not count.
func (want ruleset) difference(have ruleset, where string) *Difference {
	names := slices.Sorted(maps.Keys(want))
	for name := range have {
		if want[name] == nil {
			names = append(names, name)
		}
	}
	for _, name := range names {
		if d := want.get(name).difference(have.get(name), where+", table "+name); d != nil {
			return d
		}
	}
	return nil
}

func (want *table) difference(have *table, where string) *Difference {
	for _, c := range want.chains {
		in := where + ", chain " + c.name
		rules, ok := have.chain(c.name)
		if !ok {
			return &Difference{Where: in, Want: "the chain"}
		}
		for i := range max(len(c.rules), len(rules)) {
			d := &Difference{Where: fmt.Sprintf("%s, rule %d", in, i+1)}
			if i < len(c.rules) {
				d.Want = "-A " + c.name + " " + c.rules[i]
			}
			if i < len(rules) {
				d.Have = "-A " + c.name + " " + rules[i]
			}
			if d.Want != d.Have {
				return d
			}
		}
	}
	for _, c := range have.chains {
		if _, ok := want.chain(c.name); !ok {
			return &Difference{Where: where, Have: "chain " + c.name}
		}
	}
	missing, extra := jumpsBetween(want.jumps, have.jumps)
	if len(missing) > 0 {
		return &Difference{Where: where, Want: "-A " + missing[0].from + " " + missing[0].rule}
	}
	if len(extra) > 0 {
		return &Difference{Where: where, Have: fmt.Sprintf("-A %s %s (rule %d)", extra[0].from, extra[0].rule, extra[0].pos)}
	}
	return nil
}

// jumpsBetween returns the jumps that have lacks, and those it has too many of.
func jumpsBetween(want, have []jump) (missing, extra []jump) {
	extra = slices.Clone(have)
	for _, w := range want {
		i := slices.IndexFunc(extra, func(h jump) bool { return h.from == w.from && h.to == w.to })
		if i < 0 {
			missing = append(missing, w)
		} else {
			extra = slices.Delete(extra, i, i+1)
		}
	}
	return missing, extra
}

// restore prints the input of iptables-restore --noflush that makes have into
// want. Tables that are as they should be are not in it, so that their counters
// live on; where nothing is to be done it is empty.
//
// Each table is replaced at once by the kernel, but one after another: the order
// is such that the pod is redirected all the while. A change from tproxy to
// redirect writes nat before it clears mangle, the change back writes mangle
// first; in between both are there, and mangle, where TPROXY finds the proxy's
// socket, comes first on a packet's way.
func (want ruleset) restore(have ruleset) string {
	order := []string{tableRaw, tableNat, tableMangle}
	if want[tableMangle] != nil {
		order = []string{tableRaw, tableMangle, tableNat}
	}
	for name := range have {
		if !slices.Contains(order, name) {
			order = append(order, name)
		}
	}
	var b strings.Builder
	for _, name := range order {
		if want.get(name).difference(have.get(name), "") != nil {
			want.get(name).restore(have.get(name), name, &b)
		}
	}
	return b.String()
}

func (want *table) restore(have *table, name string, b *strings.Builder) {
	fmt.Fprintf(b, "*%s\n", name)
	for _, c := range want.chains {
		fmt.Fprintf(b, ":%s - [0:0]\n", c.name) // made, or emptied
	}
	var stale []string
	for _, c := range have.chains {
		if _, ok := want.chain(c.name); !ok {
			stale = append(stale, c.name)
			fmt.Fprintf(b, ":%s - [0:0]\n", c.name)
		}
	}
	missing, extra := jumpsBetween(want.jumps, have.jumps)
	for _, j := range extra {
		fmt.Fprintf(b, "-D %s %s\n", j.from, j.rule)
	}
	for _, j := range missing {
		// First in its chain: where somebody's rule accepts or redirects above
		// ours, connections pass the proxy that the policy says it takes. What we
		// leave alone RETURNs to the rules of others. Only when it is missing:
		// who comes first in the end is not worth a fight.
		fmt.Fprintf(b, "-I %s %d %s\n", j.from, j.pos, j.rule)
	}
	for _, c := range want.chains {
		for _, r := range c.rules {
			fmt.Fprintf(b, "-A %s %s\n", c.name, r)
		}
	}
	for _, name := range stale {
		fmt.Fprintf(b, "-X %s\n", name)
	}
	b.WriteString("COMMIT\n")
}
