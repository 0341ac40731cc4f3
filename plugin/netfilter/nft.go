package netfilter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/preroute/preroute/plugin/redirect"
	"golang.org/x/sys/unix"
)

// NFT programs policies as one nftables table, inet preroute, over netlink: no
// program is run, and the table is replaced in one transaction, so that the
// namespace has the old policy or the new one at every moment, also when this
// process is killed. It needs CAP_NET_ADMIN over the namespace, and Linux 5.2
// for NAT in tables of family inet.
type NFT struct{}

// Name is "nft".
func (NFT) Name() string { return "nft" }

// chunk is how many set elements go in one message: the list is one netlink
// attribute, whose length has 16 bits.
const chunk = 500

// elemSize is the length of most elements in a message.
const elemSize = 32

// Apply leaves exactly policy p in the namespace, or what was there and an error.
func (n NFT) Apply(ns int, p *redirect.Policy) (changed bool, err error) {
	if err := Supported(p); err != nil {
		return false, err
	}
	want := compileNFT(p)
	if want == nil {
		return n.remove(ns)
	}
	c, err := openNFT(ns)
	if err != nil {
		return false, err
	}
	defer c.close()
	_, undo, err := addRoutes(ns, p)
	if err != nil {
		return false, err
	}
	err = c.write(want, create)
	if err == nil {
		// An earlier run that was killed between routes and table left no table.
		if strayRoutes(ns, p) {
			_, err = removeUnneeded(ns, p)
		}
		return true, err
	}
	if !errors.Is(err, unix.EEXIST) {
		undo()
		return false, err
	}
	// An earlier policy's table is there, perhaps this one's.
	if c.check(want) == nil && checkRoutes(ns, p) == nil {
		return false, nil
	}
	if err := c.write(want, replace); err != nil {
		undo()
		return false, err
	}
	if _, err := removeUnneeded(ns, p); err != nil {
		return true, err
	}
	return true, nil
}

// Check returns nil, or a *Difference for the first thing that is not as p says.
func (n NFT) Check(ns int, p *redirect.Policy) error {
	if err := Supported(p); err != nil {
		return err
	}
	c, err := openNFT(ns)
	if err != nil {
		return err
	}
	defer c.close()
	if err := c.check(compileNFT(p)); err != nil {
		return err
	}
	return checkRoutes(ns, p)
}

// Remove takes the table and what belongs to it out of the namespace.
func (n NFT) Remove(ns int) error {
	_, err := n.remove(ns)
	return err
}

func (n NFT) remove(ns int) (changed bool, err error) {
	c, err := openNFT(ns)
	if err != nil {
		return false, err
	}
	defer c.close()
	there, err := c.hasTable()
	if err != nil {
		return false, err
	}
	if there {
		b := c.newBatch()
		b.table(unix.NFT_MSG_DELTABLE, 0)
		if err := c.commit(b); err != nil && !errors.Is(err, unix.ENOENT) {
			return false, fmt.Errorf("removing nft table inet %s: %w", TableName, err)
		}
	}
	routes, err := removeUnneeded(ns, &redirect.Policy{})
	return there || routes, err
}

// Present reports whether a table of ours is in the namespace.
func (NFT) Present(ns int) (bool, error) {
	c, err := openNFT(ns)
	if err != nil {
		return false, err
	}
	defer c.close()
	return c.hasTable()
}

// An nftConn is a connection to nf_tables in one network namespace.
type nftConn struct{ *nfConn }

func openNFT(ns int) (*nftConn, error) {
	c, err := dialNF(ns)
	return &nftConn{c}, err
}

func (c *nftConn) hasTable() (bool, error) {
	_, there, err := c.tableFlags()
	return there, err
}

func (c *nftConn) tableFlags() (flags uint32, there bool, err error) {
	tables, err := c.request(unix.NFT_MSG_GETTABLE, false, func(m *message) { m.str(unix.NFTA_TABLE_NAME, TableName) })
	switch {
	case err == nil && len(tables) > 0:
		return beUint32(find(tables[0], unix.NFTA_TABLE_FLAGS)), true, nil
	case err == nil, errors.Is(err, unix.ENOENT):
		return 0, false, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return 0, false, noNFTables(err)
	}
	return 0, false, fmt.Errorf("looking for nft table inet %s: %w", TableName, permission(err))
}

func noNFTables(err error) error {
	return &Unsupported{What: "nftables: the kernel has no nf_tables", Need: "Linux 3.13 with CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET", Err: err}
}

func permission(err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: this needs CAP_NET_ADMIN over the user namespace that owns the pod's network namespace", err)
	}
	return err
}

// How write meets a table that is there already.
type writeMode int

const (
	create  writeMode = iota // EEXIST, and nothing is changed
	replace                  // the old one goes in the same transaction
)

// write sends the whole table as one transaction.
func (c *nftConn) write(want *nftTable, mode writeMode) error {
	b := c.newBatch()
	elems := 0
	for _, s := range want.sets {
		elems += len(s.elems)
	}
	b.b = slices.Grow(b.b, elems*elemSize)
	if mode == replace {
		b.table(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE) // so that there is one to delete
		b.table(unix.NFT_MSG_DELTABLE, 0)
	}
	b.table(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	for i, s := range want.sets {
		b.set(s, uint32(i+1))
	}
	for _, ch := range want.chains { // all first: a rule may jump to a later one
		b.chain(ch)
	}
	for _, ch := range want.chains {
		for _, r := range ch.rules {
			if err := b.rule(ch, r); err != nil {
				return err
			}
		}
	}
	if err := c.commit(b); err != nil {
		return fmt.Errorf("writing nft table inet %s: %w", TableName, c.explain(err))
	}
	return nil
}

func (b *batch) table(msg, flags uint16) {
	b.nft(msg, flags, say("the table"), func() { b.str(unix.NFTA_TABLE_NAME, TableName) })
}

// setFlags are NFT_SET_INTERVAL or none: a named set that rules look up.
func (s *nftSet) flags() uint32 {
	if s.interval {
		return unix.NFT_SET_INTERVAL
	}
	return 0
}

func (b *batch) set(s *nftSet, id uint32) {
	order := uint32(2) // BYTEORDER_BIG_ENDIAN of nft(8), which reads it to print the keys
	if s.host {
		order = 1
	}
	b.nft(unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE, say("set %s", s.name), func() {
		b.str(unix.NFTA_SET_TABLE, TableName)
		b.str(unix.NFTA_SET_NAME, s.name)
		b.u32(unix.NFTA_SET_FLAGS, s.flags())
		b.u32(unix.NFTA_SET_KEY_TYPE, s.key.GetNFTMagic())
		b.u32(unix.NFTA_SET_KEY_LEN, s.key.Bytes)
		b.u32(unix.NFTA_SET_ID, id)
		if !s.interval {
			b.nest(unix.NFTA_SET_DESC, func() { b.u32(unix.NFTA_SET_DESC_SIZE, uint32(len(s.elems))) })
		}
		b.attr(unix.NFTA_SET_USERDATA, userdata.AppendUint32(nil, userdata.NFTNL_UDATA_SET_KEYBYTEORDER, order))
	})
	for at := 0; at < len(s.elems); at += chunk {
		b.nft(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, say("elements of set %s", s.name), func() {
			b.str(unix.NFTA_SET_ELEM_LIST_TABLE, TableName)
			b.str(unix.NFTA_SET_ELEM_LIST_SET, s.name)
			b.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func() {
				for i := at; i < min(at+chunk, len(s.elems)); i++ {
					b.elem(s, &s.elems[i])
				}
			})
		})
	}
}

// elem appends one element, nest by nest without the closures: there may be
// thousands.
func (b *batch) elem(s *nftSet, e *elem) {
	el := b.open(unix.NFTA_LIST_ELEM)
	if e.end {
		b.attr(unix.NFTA_SET_ELEM_FLAGS, intervalEnd)
	}
	key := b.open(unix.NFTA_SET_ELEM_KEY)
	b.attr(unix.NFTA_DATA_VALUE, s.bytes(e))
	b.shut(key)
	b.shut(el)
}

var intervalEnd = binary.BigEndian.AppendUint32(nil, unix.NFT_SET_ELEM_INTERVAL_END)

func (b *batch) chain(ch *nftChain) {
	b.nft(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, say("chain %s", ch.name), func() {
		b.str(unix.NFTA_CHAIN_TABLE, ch.table)
		b.str(unix.NFTA_CHAIN_NAME, ch.name)
		if ch.typ == "" {
			return
		}
		b.nest(unix.NFTA_CHAIN_HOOK, func() {
			b.u32(unix.NFTA_HOOK_HOOKNUM, uint32(*ch.hook))
			b.u32(unix.NFTA_HOOK_PRIORITY, uint32(*ch.prio))
		})
		b.u32(unix.NFTA_CHAIN_POLICY, uint32(nftables.ChainPolicyAccept))
		b.str(unix.NFTA_CHAIN_TYPE, string(ch.typ))
	})
}

func (b *batch) rule(ch *nftChain, r nftRule) error {
	exprs := make([][]byte, len(r.exprs))
	for i, e := range r.exprs {
		var err error
		if exprs[i], err = expr.Marshal(unix.NFPROTO_INET, e); err != nil {
			return fmt.Errorf("rule %s: %w", r, err)
		}
	}
	b.nft(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, say("chain %s, rule %s", ch.name, r), func() {
		b.str(unix.NFTA_RULE_TABLE, ch.table)
		b.str(unix.NFTA_RULE_CHAIN, ch.name)
		b.nest(unix.NFTA_RULE_EXPRESSIONS, func() {
			for _, e := range exprs {
				b.attr(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, e)
			}
		})
		b.attr(unix.NFTA_RULE_USERDATA, userdata.AppendString(nil, userdata.TypeComment, r.comment))
	})
	return nil
}

// explain turns what the kernel answered to a transaction into what it lacks,
// by asking it for each thing alone.
func (c *nftConn) explain(err error) error {
	if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EINVAL) {
		return permission(err)
	}
	for _, f := range nftFeatures() {
		if c.probe(f) != nil {
			return &Unsupported{What: "nftables: the kernel has no " + f.what, Need: f.need, Err: err}
		}
	}
	return err
}

// An nftFeature is one thing that rules of ours use and a kernel can lack.
type nftFeature struct {
	what, need string
	typ        nftables.ChainType
	hook       *nftables.ChainHook
	rule       *line
}

func nftFeatures() []nftFeature {
	nat, filter := nftables.ChainTypeNAT, nftables.ChainTypeFilter
	out, pre := nftables.ChainHookOutput, nftables.ChainHookPrerouting
	return []nftFeature{
		{"nf_tables for family inet", "Linux 3.14 with CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET", filter, out, &line{}},
		{"NAT in tables of family inet", "Linux 5.2 with CONFIG_NFT_NAT", nat, out, &line{}},
		{"redirect", "Linux 5.2 with CONFIG_NFT_REDIR", nat, out, (&line{}).l4proto("==", redirect.ProtoTCP).redirect(1)},
		{"fib lookup", "Linux 4.10 with CONFIG_NFT_FIB_INET", filter, out, (&line{}).fib("daddr", redirect.Local)},
		{"connection tracking expressions", "Linux 3.14 with CONFIG_NFT_CT", filter, out, (&line{}).ctDirection(directionReply)},
		{"conntrack zones", "Linux 4.11 with CONFIG_NF_CONNTRACK_ZONES", filter, out, (&line{}).ctZoneSet()},
		{"conntrack marks", "Linux 3.14 with CONFIG_NF_CONNTRACK_MARK", filter, out, (&line{}).ctMarkSet(markToLo)},
		{"tproxy", "Linux 4.19 with CONFIG_NFT_TPROXY", filter, pre, (&line{}).l4proto("==", redirect.ProtoTCP).tproxy(1)},
	}
}

// probe tries a feature in a chain that the same transaction removes again.
func (c *nftConn) probe(f nftFeature) error {
	const name = TableName + "_probe"
	table := func(b *batch, msg, flags uint16) {
		b.nft(msg, flags, say(name), func() { b.str(unix.NFTA_TABLE_NAME, name) })
	}
	prio := nftables.ChainPriorityFilter
	ch := &nftChain{table: name, name: "probe", typ: f.typ, hook: f.hook, prio: prio}
	b := c.newBatch()
	table(b, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE)
	b.chain(ch)
	if len(f.rule.exprs) > 0 {
		if err := b.rule(ch, nftRule{line: f.rule}); err != nil {
			return err
		}
	}
	table(b, unix.NFT_MSG_DELTABLE, 0)
	return c.commit(b)
}
