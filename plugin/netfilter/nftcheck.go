package netfilter

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Checking compares what the kernel holds with what it was to be sent, rule by
// rule, at the level of netlink attributes. Not through the expressions of
// google/nftables: those it cannot read back for tproxy and "ct … set", and
// what it does not know it drops, so that a tampered rule could look right.

// dump asks for all objects of one kind, of our table where the kernel filters.
func (c *nftConn) dump(msg, tableAttr uint16) ([][]netlink.Attribute, error) {
	out, err := c.request(msg, true, func(m *message) { m.str(tableAttr, TableName) })
	if err != nil {
		return nil, fmt.Errorf("reading nft table inet %s: %w", TableName, err)
	}
	return slices.DeleteFunc(out, func(attrs []netlink.Attribute) bool {
		return cString(find(attrs, tableAttr)) != TableName
	}), nil
}

// A tree is one netlink message's attributes: leaves by path, zero values left
// out, since the kernel adds defaults that nobody sent.
type tree map[string][]byte

// nested tells which attributes hold attributes: nf_tables dumps them without
// the flag that says so. Paths are attribute types, from the message down.
func nested(path string, exprName string) bool {
	switch path {
	case exprName + "/2": // NFTA_EXPR_DATA
		return exprName != ""
	case "immediate/2/2", "immediate/2/2/2", "cmp/2/3", "bitwise/2/4", "bitwise/2/5": // NFTA_*_DATA, _MASK, _XOR; the verdict
		return true
	}
	return false
}

func attributes(b []byte) []netlink.Attribute {
	attrs, err := netlink.UnmarshalAttributes(b)
	if err != nil {
		return nil
	}
	for i := range attrs {
		attrs[i].Type &^= unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER
	}
	return attrs
}

func find(attrs []netlink.Attribute, typ uint16) []byte {
	for _, a := range attrs {
		if a.Type == typ {
			return a.Data
		}
	}
	return nil
}

func cString(b []byte) string { return string(bytes.TrimRight(b, "\x00")) }

// exprsOf reads the expressions of a rule into a comparable form.
func exprsOf(list []byte) []string {
	var out []string
	for _, el := range attributes(list) { // NFTA_LIST_ELEM
		attrs := attributes(el.Data)
		name := cString(find(attrs, unix.NFTA_EXPR_NAME))
		t := tree{}
		if name != "counter" { // its value is nobody's policy
			t.collect(name, name, []netlink.Attribute{{Type: unix.NFTA_EXPR_DATA, Data: find(attrs, unix.NFTA_EXPR_DATA)}})
		}
		switch name {
		case "lookup":
			delete(t, fmt.Sprintf("lookup/2/%d", unix.NFTA_LOOKUP_SET_ID)) // of the transaction only
		case "nat": // the kernel fills in the end of the range, and says that there is one
			delete(t, fmt.Sprintf("nat/2/%d", unix.NFTA_NAT_REG_ADDR_MAX))
			flags := fmt.Sprintf("nat/2/%d", unix.NFTA_NAT_FLAGS)
			t[flags] = binary.BigEndian.AppendUint32(nil, beUint32(t[flags])|unix.NF_NAT_RANGE_MAP_IPS)
		}
		out = append(out, name+t.String())
	}
	return out
}

func (t tree) collect(path, exprName string, attrs []netlink.Attribute) {
	for _, a := range attrs {
		p := fmt.Sprintf("%s/%d", path, a.Type)
		switch {
		case nested(p, exprName):
			t.collect(p, exprName, attributes(a.Data))
		case len(bytes.Trim(a.Data, "\x00")) > 0:
			t[p] = a.Data
		}
	}
}

func (t tree) String() string {
	parts := make([]string, 0, len(t))
	for p, v := range t {
		parts = append(parts, fmt.Sprintf(" %s=%x", p[strings.Index(p, "/2/")+3:], bytes.TrimRight(v, "\x00")))
	}
	slices.Sort(parts)
	return strings.Join(parts, "")
}

// check compares the table in the kernel with the one it should be; nil means
// that there should be none.
func (c *nftConn) check(want *nftTable) error {
	flags, there, err := c.tableFlags()
	if err != nil {
		return err
	}
	where := "nft table inet " + TableName
	switch {
	case want == nil && there:
		return &Difference{Where: where, Have: "the table, while the policy redirects nothing"}
	case want == nil:
		return nil
	case !there:
		return &Difference{Where: where, Want: "the table"}
	case flags != 0:
		return &Difference{Where: where, Want: "no flags", Have: fmt.Sprintf("flags %#x (1: dormant)", flags)}
	}
	if err := c.checkChains(want, where); err != nil {
		return err
	}
	if err := c.checkRules(want, where); err != nil {
		return err
	}
	return c.checkSets(want, where)
}

func (c *nftConn) checkChains(want *nftTable, where string) error {
	replies, err := c.dump(unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE)
	if err != nil {
		return err
	}
	have := map[string]string{}
	for _, attrs := range replies {
		desc := "a chain without a hook"
		if hook := attributes(find(attrs, unix.NFTA_CHAIN_HOOK)); len(hook) > 0 {
			desc = describeChain(cString(find(attrs, unix.NFTA_CHAIN_TYPE)),
				beUint32(find(hook, unix.NFTA_HOOK_HOOKNUM)),
				int32(beUint32(find(hook, unix.NFTA_HOOK_PRIORITY))),
				beUint32(find(attrs, unix.NFTA_CHAIN_POLICY)))
		}
		have[cString(find(attrs, unix.NFTA_CHAIN_NAME))] = desc
	}
	for _, ch := range want.chains {
		desc := "a chain without a hook"
		if ch.typ != "" {
			desc = describeChain(string(ch.typ), uint32(*ch.hook), int32(*ch.prio), 1)
		}
		at := where + ", chain " + ch.name
		got, ok := have[ch.name]
		if !ok {
			return &Difference{Where: at, Want: desc}
		}
		if got != desc {
			return &Difference{Where: at, Want: desc, Have: got}
		}
		delete(have, ch.name)
	}
	for name, desc := range have {
		return &Difference{Where: where + ", chain " + name, Have: desc}
	}
	return nil
}

func describeChain(typ string, hook uint32, prio int32, policy uint32) string {
	hooks := []string{"prerouting", "input", "forward", "output", "postrouting"}
	h := fmt.Sprint(hook)
	if int(hook) < len(hooks) {
		h = hooks[hook]
	}
	pol := "accept"
	if policy == 0 {
		pol = "drop"
	}
	return fmt.Sprintf("type %s hook %s priority %d policy %s", typ, h, prio, pol)
}

type haveRule struct {
	exprs   []string
	comment string
}

func (c *nftConn) checkRules(want *nftTable, where string) error {
	replies, err := c.dump(unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE)
	if err != nil {
		return err
	}
	have := map[string][]haveRule{}
	for _, attrs := range replies {
		chain := cString(find(attrs, unix.NFTA_RULE_CHAIN))
		text, _ := userdata.GetString(find(attrs, unix.NFTA_RULE_USERDATA), userdata.TypeComment)
		have[chain] = append(have[chain], haveRule{exprsOf(find(attrs, unix.NFTA_RULE_EXPRESSIONS)), text})
	}
	for _, ch := range want.chains {
		got := have[ch.name]
		for i, r := range ch.rules {
			at := fmt.Sprintf("%s, chain %s, rule %d", where, ch.name, i+1)
			if i >= len(got) {
				return &Difference{Where: at, Want: r.describe()}
			}
			if !slices.Equal(r.compiled(), got[i].exprs) {
				return &Difference{Where: at, Want: r.describe(), Have: got[i].describe(ch)}
			}
		}
		if len(got) > len(ch.rules) {
			return &Difference{Where: fmt.Sprintf("%s, chain %s, rule %d", where, ch.name, len(ch.rules)+1), Have: got[len(ch.rules)].describe(ch)}
		}
	}
	return nil
}

func (r nftRule) describe() string {
	return strings.ReplaceAll(r.String(), "counter packets 0 bytes 0 ", "") + " (" + r.comment + ")"
}

// compiled is the rule's expressions as the kernel would show them.
func (r nftRule) compiled() []string {
	var list []netlink.Attribute
	for _, e := range r.exprs {
		data, err := expr.Marshal(unix.NFPROTO_INET, e)
		if err != nil {
			return nil // cannot happen: Apply sends the same
		}
		list = append(list, netlink.Attribute{Type: unix.NFTA_LIST_ELEM, Data: data})
	}
	b, err := netlink.MarshalAttributes(list)
	if err != nil {
		return nil
	}
	return exprsOf(b)
}

// describe names a rule found in the kernel: as the rule of ours that it is, or
// by its comment and expressions.
func (h haveRule) describe(ch *nftChain) string {
	for _, r := range ch.rules {
		if slices.Equal(r.compiled(), h.exprs) {
			return r.describe()
		}
	}
	s := "another rule: " + strings.Join(h.exprs, "; ")
	if h.comment != "" {
		s += " (" + h.comment + ")"
	}
	return s
}

func (c *nftConn) checkSets(want *nftTable, where string) error {
	replies, err := c.dump(unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE)
	if err != nil {
		return err
	}
	have := map[string]string{}
	for _, attrs := range replies {
		have[cString(find(attrs, unix.NFTA_SET_NAME))] = describeSet(beUint32(find(attrs, unix.NFTA_SET_KEY_TYPE)), beUint32(find(attrs, unix.NFTA_SET_FLAGS)))
	}
	for _, s := range want.sets {
		at := where + ", set " + s.name
		got, ok := have[s.name]
		delete(have, s.name)
		if desc := describeSet(s.key.GetNFTMagic(), s.flags()); !ok || got != desc {
			return &Difference{Where: at, Want: desc, Have: got}
		}
		lists, err := c.request(unix.NFT_MSG_GETSETELEM, true, func(m *message) {
			m.str(unix.NFTA_SET_ELEM_LIST_TABLE, TableName)
			m.str(unix.NFTA_SET_ELEM_LIST_SET, s.name)
		})
		if err != nil {
			return fmt.Errorf("reading the elements of %s: %w", at, err)
		}
		if d := diffElements(s, lists); d != nil {
			d.Where = at
			return d
		}
	}
	for name, desc := range have {
		return &Difference{Where: where + ", set " + name, Have: desc}
	}
	return nil
}

func beUint32(b []byte) uint32 {
	if len(b) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func describeSet(keyType, flags uint32) string {
	return fmt.Sprintf("a set of key type %d, flags %d", keyType, flags)
}

func diffElements(set *nftSet, lists [][]netlink.Attribute) *Difference {
	text := func(key []byte, end bool) string {
		if end {
			return "end of interval before " + keyText(set, key)
		}
		return "element " + keyText(set, key)
	}
	found := map[string]bool{}
	for _, attrs := range lists {
		for _, el := range attributes(find(attrs, unix.NFTA_SET_ELEM_LIST_ELEMENTS)) {
			e := attributes(el.Data)
			key := find(attributes(find(e, unix.NFTA_SET_ELEM_KEY)), unix.NFTA_DATA_VALUE)
			end := beUint32(find(e, unix.NFTA_SET_ELEM_FLAGS))&unix.NFT_SET_ELEM_INTERVAL_END != 0
			// The kernel opens an interval set with the end of nothing.
			if !end || len(bytes.Trim(key, "\x00")) > 0 {
				found[text(key, end)] = true
			}
		}
	}
	for i := range set.elems {
		k := text(set.bytes(&set.elems[i]), set.elems[i].end)
		if !found[k] {
			return &Difference{Want: k}
		}
		delete(found, k)
	}
	for _, k := range slices.Sorted(maps.Keys(found)) {
		return &Difference{Have: k}
	}
	return nil
}

func keyText(set *nftSet, key []byte) string {
	if len(key) != int(set.key.Bytes) {
		return fmt.Sprintf("%x", key)
	}
	switch set.key {
	case nftables.TypeInetService:
		return fmt.Sprint(binary.BigEndian.Uint16(key))
	case nftables.TypeIPAddr, nftables.TypeIP6Addr:
		a, _ := netip.AddrFromSlice(key)
		return a.String()
	case nftables.TypeIFName:
		return cString(key)
	case nftables.TypeUID, nftables.TypeGID:
		return fmt.Sprint(binary.NativeEndian.Uint32(key))
	}
	return fmt.Sprintf("%d . %d", key[0], binary.BigEndian.Uint16(key[4:])) // portHash
}
