package main

import (
	"fmt"
	"io/fs"
	"os"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"
)

// openNetNS opens the pod's network namespace, and refuses the host's: that of
// this process, which the runtime has started there, and that of PID 1.
func openNetNS(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, types.NewError(types.ErrInvalidNetNS, fmt.Sprintf("preroute: opening the pod's network namespace: %v", &fs.PathError{Op: "open", Path: path, Err: err}), "")
	}
	var st unix.Stat_t
	kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE) // Linux 4.11
	if err == nil {
		err = unix.Fstat(fd, &st)
	}
	if err != nil || kind != unix.CLONE_NEWNET {
		unix.Close(fd)
		return -1, types.NewError(types.ErrInvalidNetNS, fmt.Sprintf("preroute: %s is not a network namespace", path), "")
	}
	for _, host := range []string{"/proc/self/ns/net", "/proc/1/ns/net"} {
		var h unix.Stat_t
		if unix.Stat(host, &h) == nil && h.Dev == st.Dev && h.Ino == st.Ino {
			unix.Close(fd)
			return -1, types.NewError(types.ErrInvalidNetNS, fmt.Sprintf("preroute: %s is the host's own network namespace; a pod with hostNetwork cannot be redirected", path), "")
		}
	}
	return fd, nil
}

// isInitialNetNS reports whether this process is in the network namespace that
// the kernel started with. Its own sysctls are in no other one: Linux registers
// net.core's machine-wide settings for the initial namespace only
// (net/core/sysctl_net_core.c), and /proc/sys shows the reader's namespace.
func isInitialNetNS() bool {
	_, err := os.Stat("/proc/sys/net/core/netdev_max_backlog")
	return err == nil
}
