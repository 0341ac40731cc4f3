package netfilter

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// MayHoldIPTables reports whether a look through the iptables backend is worth
// its cost: the namespace has legacy tables, which only iptables can read, or
// an nf_tables chain with a name of ours. It runs no program and makes no table.
func MayHoldIPTables(ns int) (bool, error) {
	legacy := false
	fd, err := socketIn(ns, func() (int, error) {
		for _, name := range []string{"/proc/thread-self/net/ip_tables_names", "/proc/thread-self/net/ip6_tables_names"} {
			legacy = legacy || !emptyFile(name)
		}
		return unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	})
	if err != nil {
		return legacy, fmt.Errorf("looking for iptables rules in the pod's network namespace: %w", err)
	}
	c := &nfConn{fd: fd}
	defer c.close()
	if legacy {
		return true, nil
	}
	for _, family := range []byte{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6} {
		chains, err := c.requestFamily(family, unix.NFT_MSG_GETCHAIN, true, func(*message) {})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return false, fmt.Errorf("looking for iptables chains: %w", err)
		}
		for _, attrs := range chains {
			if strings.HasPrefix(cString(find(attrs, unix.NFTA_CHAIN_NAME)), chainPrefix) {
				return true, nil
			}
		}
	}
	return false, nil
}

// emptyFile reads past the Go runtime's poller: the file is of /proc, and one
// byte of it is enough. One that is not there is empty.
func emptyFile(name string) bool {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return true
	}
	defer unix.Close(fd)
	n, _ := unix.Read(fd, make([]byte, 1))
	return n <= 0
}
