package netfilter

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// In the nft flavour the tables and built-in chains of iptables are nftables'
// tables and base chains. Netlink tells, without a process and without a trace,
// which there are; and it takes those out again that came with us, which
// iptables itself cannot.

// nftChains are the chains of the tables of one family, in the calling thread's
// namespace: true for those that hold nothing against being removed.
type nftChains map[string]map[string]bool

func (c nftChains) table(name string) bool        { return c[name] != nil }
func (c nftChains) chain(table, name string) bool { _, ok := c[table][name]; return ok }

func (c nftChains) ours() bool {
	for _, chains := range c {
		for name := range chains {
			if strings.HasPrefix(name, chainPrefix) {
				return true
			}
		}
	}
	return false
}

// allIn returns an error where iptables-save does not show chains of ours that
// are there: it leaves out tables that hold what iptables does not know.
func (c nftChains) allIn(rs ruleset) error {
	for table, chains := range c {
		for name := range chains {
			if _, shown := rs.get(table).chain(name); strings.HasPrefix(name, chainPrefix) && !shown {
				return &Unsupported{
					What: fmt.Sprintf("iptables-nft-save does not show chain %s of table %s, which somebody has filled with what iptables cannot read", name, table),
					Need: "nft(8): see \"nft list table ip " + table + "\", and the same for ip6",
				}
			}
		}
	}
	return nil
}

func nftFamily(is4 bool) byte {
	if is4 {
		return unix.NFPROTO_IPV4
	}
	return unix.NFPROTO_IPV6
}

func listNftChains(is4 bool) (nftChains, error) {
	out := nftChains{}
	c, err := dialNF(CurrentNetNS)
	if _, lacks := errors.AsType[*Unsupported](err); lacks {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	defer c.close()
	tables, err := c.requestFamily(nftFamily(is4), unix.NFT_MSG_GETTABLE, true, func(*message) {})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		return out, nil // a kernel without nf_tables
	}
	if errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("listing the pod's nftables tables: %w; it needs the capability NET_ADMIN over the pod's network namespace", err)
	}
	if err != nil {
		return nil, fmt.Errorf("listing the pod's nftables tables: %w", err)
	}
	if len(tables) == 0 {
		return out, nil
	}
	for _, t := range tables {
		out[cString(find(t, unix.NFTA_TABLE_NAME))] = map[string]bool{}
	}
	chains, err := c.requestFamily(nftFamily(is4), unix.NFT_MSG_GETCHAIN, true, func(*message) {})
	if err != nil {
		return nil, fmt.Errorf("listing the pod's nftables chains: %w", err)
	}
	for _, ch := range chains {
		table, policy := out[cString(find(ch, unix.NFTA_CHAIN_TABLE))], find(ch, unix.NFTA_CHAIN_POLICY)
		if table != nil {
			table[cString(find(ch, unix.NFTA_CHAIN_NAME))] = policy == nil || beUint32(policy) == uint32(nftables.ChainPolicyAccept)
		}
	}
	return out, nil
}

// born returns the rules of the jumps that say, for each chain and table that is
// about to be made, that we made it. A jump that stays keeps what it says; a new
// one in a table of ours says so too, since the one that said so may go.
func (want ruleset) born(have ruleset, there nftChains) {
	for name, t := range want {
		old := have.get(name).jumps
		ourTable := !there.table(name)
		for _, j := range old {
			ourTable = ourTable || j.madeTable()
		}
		missing, _ := jumpsBetween(t.jumps, old)
		for i, j := range t.jumps {
			for _, m := range missing {
				if m != j {
					continue
				}
				made := ""
				switch ourChain := !there.chain(name, j.from); {
				case ourChain && ourTable:
					made = madeBoth
				case ourChain:
					made = madeChain
				case ourTable:
					made = madeTable
				}
				t.jumps[i] = newJump(j.from, j.to, made)
			}
		}
	}
}

// sweep removes the base chains and tables that came with jumps that are gone:
// before had them, after has not. What others put into them meanwhile stays, and
// so do they. A process killed just before it leaves an empty base chain, which
// does nothing. (iptables 1.8.2 to 1.8.4 also make the built-in chains we did not
// ask for; those stay.)
func sweep(is4 bool, before, after ruleset) error {
	var there nftChains
	var conn *nfConn
	for name, t := range before {
		_, gone := jumpsBetween(after.get(name).jumps, t.jumps)
		gone = slices.DeleteFunc(gone, func(j jump) bool { return !j.madeChain() && !j.madeTable() })
		if len(gone) == 0 {
			continue
		}
		if conn == nil {
			var err error
			if there, err = listNftChains(is4); err != nil {
				return err
			}
			if conn, err = dialNF(CurrentNetNS); err != nil {
				return err
			}
			defer conn.close()
		}
		table := false
		for _, j := range gone {
			if j.madeChain() && there[name][j.from] {
				if err := nftDelete(conn, is4, name, j.from); err != nil {
					return fmt.Errorf("removing the empty chain %s of table %s: %w", j.from, name, err)
				}
			}
			table = table || j.madeTable()
		}
		if table && len(after.get(name).jumps) == 0 {
			if err := nftDelete(conn, is4, name, ""); err != nil {
				return fmt.Errorf("removing the empty table %s: %w", name, err)
			}
		}
	}
	return nil
}

// nftDelete removes a chain, or a table when chain is "", if it is empty. The
// kernel looks, at the moment of removal, because of NLM_F_NONREC: without it
// rules that somebody adds right now would go too.
func nftDelete(c *nfConn, is4 bool, table, chain string) error {
	b := c.newBatch()
	msg := uint16(unix.NFT_MSG_DELTABLE)
	if chain != "" {
		msg = unix.NFT_MSG_DELCHAIN
	}
	b.begin(unix.NFNL_SUBSYS_NFTABLES<<8|msg, unix.NLM_F_NONREC, 0, nftFamily(is4), func() {
		if chain == "" {
			b.str(unix.NFTA_TABLE_NAME, table)
			return
		}
		b.str(unix.NFTA_CHAIN_TABLE, table)
		b.str(unix.NFTA_CHAIN_NAME, chain)
	})
	err := c.commit(b)
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENOENT) {
		return nil // somebody uses it by now, or has removed it
	}
	return err
}
