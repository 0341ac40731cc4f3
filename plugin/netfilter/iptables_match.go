package netfilter

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/preroute/preroute/plugin/redirect"
)

// A chainWriter turns matches into lines of one chain.
//
// One match may need several lines, since iptables has no sets: one for each
// network and each UID, and one for each 15 ports. That serves a list of which
// one item must hold. It does not serve "none of these", which one line can say
// of a single item only ("! -d 10.0.0.0/8"). There the chain is split: each item
// leads on, by goto, to a next chain that holds the rules that follow; what none
// of them led away is matched, here:
//
//	-A PREROUTE_OUTPUT   -d 10.0.0.0/8 -g PREROUTE_OUTPUT_2
//	-A PREROUTE_OUTPUT   -d 172.16.0.0/12 -g PREROUTE_OUTPUT_2
//	-A PREROUTE_OUTPUT   -j RETURN
//	-A PREROUTE_OUTPUT_2 ...
//
// The complement of the set would do without the split for ports, but not for
// networks, and nobody would know their policy in it.
type chainWriter struct {
	is4    bool
	dev    string         // how this chain names the interface: -i or -o
	guard  redirect.Proto // every packet here is known to be one of these; 0: nothing known
	base   string
	chains []chain // the last one is being written
}

func newChainWriter(name, dev string, is4 bool) *chainWriter {
	return &chainWriter{is4: is4, dev: dev, base: name, chains: []chain{{name: name}}}
}

func (w *chainWriter) emit(words ...string) {
	c := &w.chains[len(w.chains)-1]
	words = slices.DeleteFunc(words, func(s string) bool { return s == "" })
	c.rules = append(c.rules, strings.Join(words, " "))
}

// only lets all but one protocol pass.
func (w *chainWriter) only(p redirect.Proto) {
	w.add(redirect.Match{NotProto: p}, "", "-j RETURN", "Z1: a protocol that is not redirected")
}

// add writes the lines by which packets that match m, and extra, get target.
func (w *chainWriter) add(m redirect.Match, extra, target, why string) {
	if w.guard != 0 {
		if m.NotProto != 0 && w.guard&^m.NotProto == 0 {
			return // none of these protocols comes here
		}
		if m.Proto == 0 {
			m.Proto = w.guard
		} else if m.Proto &= w.guard; m.Proto == 0 {
			return
		}
	}
	m.NotSrc, m.NotDst = m.NotSrc.Family(w.is4), m.NotDst.Family(w.is4)
	if isAll(m.NotSrc) || isAll(m.NotDst) {
		return // no packet is outside of everything
	}
	needed := needsProto(extra, target)
	said := "-m comment --comment " + quoted(why)

	// What "!" cannot say leads on to the next chain.
	var away []redirect.Match
	if m.NotProto == redirect.ProtoTCP|redirect.ProtoUDP {
		away = append(away, redirect.Match{Proto: redirect.ProtoTCP}, redirect.Match{Proto: redirect.ProtoUDP})
	}
	if len(m.NotSrc) > 1 {
		away = append(away, redirect.Match{Proto: m.Proto, Src: m.NotSrc})
		m.NotSrc = nil
	}
	if len(m.NotDst) > 1 {
		away = append(away, redirect.Match{Proto: m.Proto, Dst: m.NotDst})
		m.NotDst = nil
	}
	if len(portChunks(m.NotDstPorts)) > 1 {
		away = append(away, redirect.Match{Proto: m.Proto, DstPorts: m.NotDstPorts})
		m.NotDstPorts = nil
	}
	if len(away) > 0 {
		next := fmt.Sprintf("%s_%d", w.base, len(w.chains)+1)
		for _, a := range away {
			for _, line := range w.lines(a, false) {
				w.emit(line, "-m comment --comment "+quoted("not "+why), "-g "+next)
			}
		}
		rest := m
		if rest.NotProto == redirect.ProtoTCP|redirect.ProtoUDP {
			rest.NotProto = 0
		}
		lines := w.lines(rest, needed)
		for _, line := range lines {
			w.emit(line, extra, said, target)
		}
		if !slices.Equal(lines, []string{""}) || extra != "" { // some come past it
			w.emit("-m comment --comment "+quoted("not "+why), "-g "+next)
		}
		w.chains = append(w.chains, chain{name: next})
	} else {
		for _, line := range w.lines(m, needed) {
			w.emit(line, extra, said, target)
		}
	}
	if m.NotProto != 0 {
		w.guard = m.NotProto
	}
}

// needsProto reports whether iptables accepts a rule with these only after -p.
func needsProto(extra, target string) bool {
	return strings.HasPrefix(extra, "-m tcp") || strings.HasPrefix(target, "-j REDIRECT") || strings.HasPrefix(target, "-j TPROXY")
}

// lines prints a match: one line for each way it can hold, "" for anything, none
// where it cannot hold in this family.
func (w *chainWriter) lines(m redirect.Match, needsProto bool) []string {
	lines := []string{""}
	// and combines what there is with each of the ways a condition can hold, in
	// the order in which iptables-save prints conditions.
	and := func(ways ...string) {
		var out []string
		for _, l := range lines {
			for _, way := range ways {
				out = append(out, strings.TrimSpace(l+" "+way))
			}
		}
		lines = out
	}
	nets := func(flag string, in, notIn redirect.Nets) {
		if of := in.Family(w.is4); len(in) > 0 && !isAll(of) {
			var ways []string
			for _, n := range of {
				ways = append(ways, flag+" "+n.String())
			}
			and(ways...)
		}
		if len(notIn) == 1 {
			and("! " + flag + " " + notIn[0].String())
		}
	}
	nets("-s", m.Src, m.NotSrc)
	nets("-d", m.Dst, m.NotDst)
	if len(m.Interfaces) > 0 {
		var ways []string
		for _, name := range m.Interfaces {
			ways = append(ways, w.dev+" "+name)
		}
		and(ways...)
	}
	and(w.protoAndPorts(m, needsProto)...)
	if len(m.UIDs)+len(m.GIDs) > 0 {
		var ways []string
		for _, id := range m.UIDs {
			ways = append(ways, fmt.Sprintf("-m owner --uid-owner %d", id))
		}
		for _, id := range m.GIDs {
			ways = append(ways, fmt.Sprintf("-m owner --gid-owner %d", id))
		}
		and(ways...)
	}
	// Two matches, though one could hold both: nft list would show the first only.
	if m.SrcIs != redirect.Anywhere {
		and("-m addrtype " + locality("--src-type", m.SrcIs))
	}
	if m.DstIs != redirect.Anywhere {
		and("-m addrtype " + locality("--dst-type", m.DstIs))
	}
	return lines
}

func (w *chainWriter) protoAndPorts(m redirect.Match, needed bool) []string {
	if m.NotProto != 0 {
		return []string{"! -p " + m.NotProto.String()}
	}
	chunks, not := portChunks(m.DstPorts), ""
	if len(m.NotDstPorts) > 0 {
		chunks, not = portChunks(m.NotDstPorts), "! "
	}
	if len(chunks) == 0 && m.SrcPort == 0 && !needed && m.Proto == w.guard {
		return []string{""}
	}
	var ways []string
	for _, proto := range []redirect.Proto{redirect.ProtoTCP, redirect.ProtoUDP} {
		if m.Proto&proto == 0 {
			continue
		}
		way := "-p " + proto.String()
		if m.SrcPort != 0 {
			way += fmt.Sprintf(" -m %s --sport %d", proto, m.SrcPort)
		}
		if len(chunks) == 0 {
			ways = append(ways, way)
		}
		for _, c := range chunks {
			if strings.Contains(c, ",") || m.SrcPort != 0 {
				ways = append(ways, fmt.Sprintf("%s -m multiport %s--dports %s", way, not, c))
			} else {
				ways = append(ways, fmt.Sprintf("%s -m %s %s--dport %s", way, proto, not, c))
			}
		}
	}
	return ways
}

func locality(flag string, l redirect.Locality) string {
	if l == redirect.NotLocal {
		flag = "! " + flag
	}
	return flag + " LOCAL"
}

// isAll reports whether a set of one family's networks is the whole family,
// which iptables-save does not print. A set has no network inside another.
func isAll(ns redirect.Nets) bool { return len(ns) == 1 && ns[0].Bits() == 0 }

// multiportMax is how many ports one multiport match takes; a range counts two.
const multiportMax = 15

// portChunks prints a set of ports in pieces that one match can take.
func portChunks(ps redirect.Ports) []string {
	var chunks []string
	var items []string
	room := multiportMax
	for _, r := range ps {
		item, cost := strconv.Itoa(int(r.First)), 1
		if r.Last != r.First {
			item, cost = fmt.Sprintf("%d:%d", r.First, r.Last), 2
		}
		if cost > room {
			chunks = append(chunks, strings.Join(items, ","))
			items, room = nil, multiportMax
		}
		items = append(items, item)
		room -= cost
	}
	if len(items) > 0 {
		chunks = append(chunks, strings.Join(items, ","))
	}
	return chunks
}
