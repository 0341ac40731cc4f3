// Package sandbox makes network namespaces for the demo and the benchmarks.
//
// They have no name in the file system: each is held by an open file of this
// process and reached by others as /proc/PID/fd/N. So nothing has to be
// cleaned up: when the process ends, however it ends, its namespaces, their
// links and their rules are gone. Linux only, and only for root.
package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A Netns is a network namespace.
type Netns struct{ f *os.File }

// New makes a network namespace whose loopback is up.
func New() (*Netns, error) {
	var n *Netns
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("making a network namespace (needs root): %w", err)
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			return fmt.Errorf("opening the new network namespace: %w", err)
		}
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err != nil {
			f.Close()
			return fmt.Errorf("setting lo up: %w", err)
		}
		n = &Netns{f}
		return nil
	})
	return n, err
}

// Several makes n namespaces with make, and a function that lets go of them. Timings
// make all of theirs before and let go after: the kernel deletes namespaces at
// leisure, in the way of whatever runs then.
func Several(n int, make func() (*Netns, error)) (list []*Netns, closeAll func(), err error) {
	closeAll = func() {
		for _, n := range list {
			n.Close()
		}
	}
	for range n {
		one, err := make()
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		list = append(list, one)
	}
	return list, closeAll, nil
}

// Path is what other processes open.
func (n *Netns) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.f.Fd()) }

// Fd is the open namespace.
func (n *Netns) Fd() int { return int(n.f.Fd()) }

// Close lets go of the namespace.
func (n *Netns) Close() error { return n.f.Close() }

// Do calls fn in the namespace. Sockets that fn makes and processes that it
// starts belong there; goroutines that it starts do not.
func (n *Netns) Do(fn func() error) error { return n.As(0, fn) }

// As calls fn in the namespace under a UID, which is also its only group.
func (n *Netns) As(uid int, fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(n.Fd(), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("entering the network namespace: %w", err)
		}
		if uid != 0 {
			if err := become(uid); err != nil {
				return fmt.Errorf("becoming uid %d: %w", uid, err)
			}
		}
		return fn()
	})
}

// become changes the credentials of this thread alone; the os and syscall
// packages would change the whole process.
func become(uid int) error {
	id := uintptr(uid)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); errno != 0 {
		return errno
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, id, id, id); errno != 0 {
		return errno
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, id, id, id); errno != 0 {
		return errno
	}
	return nil
}

// onThread calls fn on a thread that ends with it, so that what fn changes of
// the thread touches nobody else.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread dies with the goroutine
		err := errors.New("panicked")
		defer func() { done <- err }()
		err = fn()
	}()
	return <-done
}

// Sysctl writes a setting of the namespace, "net/ipv4/ip_forward".
func (n *Netns) Sysctl(name, value string) error {
	return n.Do(func() error {
		if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0o644); err != nil {
			return fmt.Errorf("setting sysctl %s: %w", name, err)
		}
		return nil
	})
}

// Listen listens in the namespace under a UID, on both families.
func (n *Netns) Listen(uid int, port uint16) ([]net.Listener, error) {
	var lns []net.Listener
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	err := n.As(uid, func() error {
		for _, network := range []string{"tcp4", "tcp6"} {
			ln, err := lc.Listen(context.Background(), network, fmt.Sprintf(":%d", port))
			if err != nil {
				return err
			}
			lns = append(lns, ln)
		}
		return nil
	})
	return lns, err
}
