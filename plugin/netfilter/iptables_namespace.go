package netfilter

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"github.com/preroute/preroute/plugin/redirect"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ownersMatchIn returns an *Unsupported where the kernel would refuse the owner
// match with no more than "Invalid argument": it compares the machine's IDs, and
// so does not serve a namespace whose IDs are mapped (owner_check,
// net/netfilter/xt_owner.c).
func ownersMatchIn(ns *os.File, p *redirect.Policy) error {
	if p.IsZero() || len(p.Proxy.UIDs)+len(p.Proxy.GIDs)+len(p.Outbound.ExceptUIDs) == 0 {
		return nil
	}
	var own, theirs unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/user", &own); err != nil {
		return fmt.Errorf("looking at this process's user namespace: %w", err)
	}
	fd, err := unix.IoctlRetInt(int(ns.Fd()), unix.NS_GET_USERNS)
	switch {
	case err == nil:
		defer unix.Close(fd)
		if err := unix.Fstat(fd, &theirs); err != nil {
			return fmt.Errorf("looking at the user namespace that owns the pod's network namespace: %w", err)
		}
		if own.Dev == theirs.Dev && own.Ino == theirs.Ino {
			return nil
		}
	case errors.Is(err, unix.EPERM): // it is none of ours, nor inside
	default:
		return fmt.Errorf("asking which user namespace owns the pod's network namespace: %w", err)
	}
	return &Unsupported{
		What: "the pod has user IDs of its own (hostUsers: false), and iptables cannot match the owner of a socket there",
		Need: `"backend": "nft", which can`,
	}
}

// lockWait is how long another Preroute may take in the same namespace. It is
// far above what it does take.
const lockWait = 20 * time.Second

// inNamespace runs f in a thread that is in the network namespace ns, with the
// namespace's own file locked: an advisory lock that leaves no file behind, that
// keeps two of us apart, and that nobody outside of the pod waits for. how is
// unix.LOCK_EX, LOCK_SH, or 0 for no lock.
func inNamespace(ns, how int, f func(lock *os.File) error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, since it is in the
		// wrong namespace for any other.
		runtime.LockOSThread()
		done <- func() error {
			if ns != CurrentNetNS {
				if err := netns.Set(netns.NsHandle(ns)); err != nil {
					return fmt.Errorf("entering the pod's network namespace: %w", err)
				}
			}
			// Opened anew: a lock belongs to the open file, and the caller's may be
			// open elsewhere.
			lock, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				return fmt.Errorf("opening the pod's network namespace: %w", err)
			}
			if how != 0 {
				if err := lockFile(lock, how); err != nil {
					return err
				}
			}
			defer lock.Close()
			return f(lock)
		}()
	}()
	return <-done
}

// lockFile waits for the lock. On time-out it leaves the file to the waiting
// thread, which closes it.
func lockFile(file *os.File, how int) error {
	got := make(chan error, 1)
	fd := int(file.Fd())
	go func() {
		err := unix.Flock(fd, how)
		for errors.Is(err, unix.EINTR) {
			err = unix.Flock(fd, how)
		}
		got <- err
	}()
	select {
	case err := <-got:
		if err != nil {
			file.Close()
			return fmt.Errorf("locking the pod's network namespace: %w", err)
		}
		return nil
	case <-time.After(lockWait):
		go func() { <-got; file.Close() }()
		return fmt.Errorf("another process has held the lock (flock) on the pod's network namespace for %v; try again when it has ended", lockWait)
	}
}
