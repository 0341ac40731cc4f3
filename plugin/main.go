// Command preroute redirects a pod's traffic to its sidecar proxy.
//
// With CNI_COMMAND in its environment it is a chained CNI plugin, called by the
// container runtime while the pod's sandbox is made. Else it is a program for
// people and containers: preroute init | verify | check | explain | version.
//
// Its limits: TCP and DNS only in this version; it works on the network
// namespace it is given and never on the host's.
package main

import (
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"

	"github.com/preroute/preroute/plugin/netfilter"
)

// version is set by the build.
var version = "dev"

// Exit codes of the commands. A CNI error exits with 1, as the CNI library does.
const (
	exitOK        = 0
	exitFailed    = 1  // what was asked for was not reached; check: it differs
	exitUsage     = 2  // the command line or the policy is wrong
	exitNotBefore = 95 // verify: the pod is not redirected
)

func main() { os.Exit(run()) }

func run() int {
	// A garbage collection costs more than the memory that this process can use
	// in its few milliseconds: none below 12 MiB.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(12 << 20)
	if os.Getenv("CNI_COMMAND") != "" {
		return runCNI()
	}
	if len(os.Args) < 2 {
		usage(os.Stderr)
		return exitUsage
	}
	args := os.Args[2:]
	switch cmd := os.Args[1]; cmd {
	case "init":
		return runInit(args)
	case "verify":
		return runVerify(args)
	case "check":
		return runCheck(args)
	case "explain":
		return runExplain(args)
	case "version", "--version", "-version":
		fmt.Printf("preroute %s\n", version)
		return exitOK
	case "help", "--help", "-help", "-h":
		usage(os.Stdout)
		return exitOK
	default:
		fmt.Fprintf(os.Stderr, "preroute: unknown command %q\n\n", cmd)
		usage(os.Stderr)
		return exitUsage
	}
}

func usage(w io.Writer) {
	fmt.Fprintf(w, `preroute %s: redirects a pod's traffic to its sidecar proxy

As a CNI plugin (CNI_COMMAND set; spec %s) it is called by the container runtime.
Else:
  preroute init      apply the policy in PREROUTE_POLICY to the network namespace it runs in
  preroute verify    prove, without privileges, that this pod is redirected; exit %d if not
  preroute check     compare what is in place with a policy, first difference first
  preroute explain   say what a policy does to a connection, and by which rule
  preroute version

"preroute COMMAND -h" lists the flags of a command.
`, version, strings.Join(specVersions, ", "), exitNotBefore)
}

// fail prints an error of a command and returns the exit code for it.
func fail(code int, format string, args ...any) int {
	fmt.Fprintf(os.Stderr, "preroute: "+format+"\n", args...)
	return code
}

// current stands for the network namespace that the process is in.
const current = netfilter.CurrentNetNS
