package netfilter

import (
	"encoding/binary"
	"strings"

	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// Counter is how often a rule in place decided.
type Counter struct {
	Chain   string
	Rule    string // the rule's comment: the row of the contract, and what it matches
	Packets uint64 // in chains of type nat: connections
}

// Counters reads the counters of the rules in place, in their order.
func (NFT) Counters(ns int) ([]Counter, error) {
	c, err := openNFT(ns)
	if err != nil {
		return nil, err
	}
	defer c.close()
	replies, err := c.dump(unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE)
	if err != nil {
		return nil, err
	}
	var out []Counter
	for _, attrs := range replies {
		text, _ := userdata.GetString(find(attrs, unix.NFTA_RULE_USERDATA), userdata.TypeComment)
		counter := Counter{Chain: cString(find(attrs, unix.NFTA_RULE_CHAIN)), Rule: strings.TrimRight(text, "\x00")}
		for _, el := range attributes(find(attrs, unix.NFTA_RULE_EXPRESSIONS)) {
			e := attributes(el.Data)
			if cString(find(e, unix.NFTA_EXPR_NAME)) != "counter" {
				continue
			}
			if p := find(attributes(find(e, unix.NFTA_EXPR_DATA)), unix.NFTA_COUNTER_PACKETS); len(p) == 8 {
				counter.Packets = binary.BigEndian.Uint64(p)
			}
		}
		out = append(out, counter)
	}
	return out, nil
}
