package netfilter

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"
)

// mayHoldIPTables reports whether it is worth its cost to look closer for
// iptables rules of ours: the namespace has legacy tables, which only iptables
// can read, or an nf_tables chain with a name of ours. It runs no program, makes
// no table, and enters the namespace once.
func mayHoldIPTables(ns int) bool {
	legacy := false
	fd, err := socketIn(ns, func() (int, error) {
		for _, is4 := range bothFamilies {
			there, err := hasLegacyTables(is4)
			if err != nil {
				return -1, err
			}
			legacy = legacy || there
		}
		return unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	})
	if err == nil {
		defer unix.Close(fd)
	}
	if legacy || err != nil {
		return true // a closer look says what is wrong
	}
	c := &nfConn{fd: fd}
	for _, is4 := range bothFamilies {
		chains, err := c.requestFamily(nftFamily(is4), unix.NFT_MSG_GETCHAIN, true, func(*message) {})
		if err != nil {
			return true
		}
		for _, attrs := range chains {
			if strings.HasPrefix(cString(find(attrs, unix.NFTA_CHAIN_NAME)), chainPrefix) {
				return true
			}
		}
	}
	return false
}

// hasLegacyTables reports whether the calling thread's namespace has legacy
// tables. To ask iptables-legacy instead would make them.
func hasLegacyTables(is4 bool) (bool, error) {
	file := "/proc/thread-self/net/ip6_tables_names"
	if is4 {
		file = "/proc/thread-self/net/ip_tables_names"
	}
	// Past the Go runtime's poller, which would cost every pod an epoll.
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // the kernel has no legacy iptables, or has not loaded it
	}
	if err != nil {
		return false, fmt.Errorf("reading which legacy iptables tables the pod has: %w", err)
	}
	defer unix.Close(fd)
	n, err := unix.Read(fd, make([]byte, 1))
	if err != nil {
		return false, fmt.Errorf("reading which legacy iptables tables the pod has: %w", err)
	}
	return n > 0, nil
}
