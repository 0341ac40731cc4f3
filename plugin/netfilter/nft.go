package netfilter

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
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
	there, err := c.hasTable()
	if err != nil {
		return false, err
	}
	if there {
		if c.check(want) == nil && CheckRoutes(ns, p) == nil {
			return false, nil
		}
	}
	_, undo, err := addRoutes(ns, p)
	if err != nil {
		return false, err
	}
	if err := c.replace(want, there); err != nil {
		undo()
		return false, err
	}
	if there { // in a fresh namespace there is nothing of an earlier policy
		if _, err := removeUnneeded(ns, p); err != nil {
			return true, err
		}
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
	return CheckRoutes(ns, p)
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
		c.DelTable(c.table)
		if err := c.Flush(); err != nil {
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
type nftConn struct {
	*nftables.Conn
	ns    int
	table *nftables.Table
}

func openNFT(ns int) (*nftConn, error) {
	c, err := nftables.New(nftables.WithNetNSFd(ns), nftables.AsLasting())
	if err != nil {
		return nil, fmt.Errorf("opening a netfilter socket in the pod's network namespace: %w", unsupportedNetlink(err))
	}
	return &nftConn{c, ns, &nftables.Table{Name: TableName, Family: nftables.TableFamilyINet}}, nil
}

func (c *nftConn) close() { _ = c.CloseLasting() }

func unsupportedNetlink(err error) error {
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return &Unsupported{What: "nftables: the kernel has no netlink for netfilter", Need: "Linux 3.13 with CONFIG_NF_TABLES", Err: err}
	}
	return err
}

func (c *nftConn) hasTable() (bool, error) {
	_, err := c.ListTableOfFamily(TableName, nftables.TableFamilyINet)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return false, &Unsupported{What: "nftables: the kernel has no nf_tables", Need: "Linux 3.13 with CONFIG_NF_TABLES", Err: err}
	case errors.Is(err, unix.EPERM):
		return false, c.explain(err)
	}
	return false, fmt.Errorf("looking for nft table inet %s: %w", TableName, err)
}

// replace sends the whole table as one transaction.
func (c *nftConn) replace(want *nftTable, there bool) error {
	if there {
		c.DelTable(c.table)
	}
	c.AddTable(c.table)
	for _, s := range want.sets {
		set := &nftables.Set{Table: c.table, Name: s.name, KeyType: s.key, Interval: s.interval}
		if s.host {
			set.KeyByteOrder = binaryutil.NativeEndian
		}
		first := s.elems[:min(chunk, len(s.elems))]
		if err := c.AddSet(set, first); err != nil {
			return fmt.Errorf("nft set %s: %w", s.name, err)
		}
		for at := len(first); at < len(s.elems); at += chunk {
			if err := c.SetAddElements(set, s.elems[at:min(at+chunk, len(s.elems))]); err != nil {
				return fmt.Errorf("nft set %s: %w", s.name, err)
			}
		}
	}
	chains := make([]*nftables.Chain, len(want.chains))
	for i, ch := range want.chains { // all first: a rule may jump to a later one
		chains[i] = c.AddChain(&nftables.Chain{Table: c.table, Name: ch.name, Type: ch.typ, Hooknum: ch.hook, Priority: ch.prio})
	}
	for i, ch := range want.chains {
		for _, r := range ch.rules {
			c.AddRule(&nftables.Rule{Table: c.table, Chain: chains[i], Exprs: r.exprs, UserData: userdata.AppendString(nil, userdata.TypeComment, r.comment)})
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("writing nft table inet %s: %w", TableName, c.explain(err))
	}
	return nil
}

// explain turns what the kernel answered to a transaction into what it lacks,
// by asking it for each thing alone.
func (c *nftConn) explain(err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: this needs CAP_NET_ADMIN over the user namespace that owns the pod's network namespace", err)
	}
	if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EPROTONOSUPPORT) {
		return err
	}
	for _, f := range nftFeatures() {
		if probe := c.probe(f); probe != nil {
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
		{"nf_tables", "Linux 3.13 with CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET", filter, out, &line{}},
		{"NAT in tables of family inet", "Linux 5.2 with CONFIG_NFT_NAT", nat, out, &line{}},
		{"redirect", "Linux 5.2 with CONFIG_NFT_REDIR", nat, out, (&line{}).l4proto("==", redirect.ProtoTCP).redirect(1)},
		{"fib lookup", "Linux 4.10 with CONFIG_NFT_FIB_INET", filter, out, (&line{}).fib("daddr", redirect.Local)},
		{"connection tracking expressions", "Linux 3.13 with CONFIG_NFT_CT", filter, out, (&line{}).ctDirection(directionReply)},
		{"conntrack zones", "Linux 4.11 with CONFIG_NF_CONNTRACK_ZONES", filter, out, (&line{}).ctZoneSet()},
		{"conntrack marks", "Linux 3.14 with CONFIG_NF_CONNTRACK_MARK", filter, out, (&line{}).ctMarkSet(markToLo)},
		{"tproxy", "Linux 4.19 with CONFIG_NFT_TPROXY", filter, pre, (&line{}).l4proto("==", redirect.ProtoTCP).tproxy(1)},
	}
}

// probe tries a feature in a table that the same transaction removes again.
func (c *nftConn) probe(f nftFeature) error {
	t := &nftables.Table{Name: TableName + "_probe", Family: nftables.TableFamilyINet}
	c.AddTable(t)
	ch := c.AddChain(&nftables.Chain{Table: t, Name: "probe", Type: f.typ, Hooknum: f.hook, Priority: nftables.ChainPriorityFilter})
	if len(f.rule.exprs) > 0 {
		c.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: append(f.rule.exprs, &expr.Counter{})})
	}
	c.DelTable(t)
	return c.Flush()
}
